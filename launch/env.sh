# shellcheck shell=bash
# Compiler flags by generation, for `source launch/env.sh v6e [NUM_SLICES]`; FLAGS=on in the settings
# makes the scripts do so. Off by default: nobody has measured them with these models.
#
# TPU: names and values of MaxText's library of flags for dense models,
#   https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/xla_flags_library.py
#   (CF_FOR_ALL_GATHER, DENSE_VMEM_LIMIT, DATA_PARALLEL_OVERLAP).
# GPU: https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance
#
# TPU_SKIP_MDS_QUERY does not belong here: with it jax does not find the other hosts of a TPU VM. It is
# for compiling without a TPU, and `arcond compile` sets it by itself.

# All-gathers of weights over fsdp run beside the computation.
_overlap="--xla_tpu_enable_async_collective_fusion=true"
_overlap+=" --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
_overlap+=" --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
_overlap+=" --xla_tpu_overlap_compute_collective_tc=true"
_overlap+=" --xla_enable_async_all_gather=true"

case ${1:-} in
  v5e | v5p) export LIBTPU_INIT_ARGS="$_overlap" ;;
  # Trillium has the on-chip memory for larger fusions.
  v6e) export LIBTPU_INIT_ARGS="$_overlap --xla_tpu_scoped_vmem_limit_kib=98304" ;;
  gpu)
    export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_gpu_enable_latency_hiding_scheduler=true"
    export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
    ;;
  *)
    echo "env.sh: ${1:-no generation} is none of v5e, v5p, v6e and gpu: source launch/env.sh v6e" >&2
    # shellcheck disable=SC2317  # where it is not sourced
    return 2 2>/dev/null || exit 2
    ;;
esac

# Between slices, gradients of one layer travel while the next is computed.
if [[ $1 != gpu && ${2:-1} -gt 1 ]]; then
  LIBTPU_INIT_ARGS+=" --xla_tpu_enable_data_parallel_all_reduce_opt=true"
  LIBTPU_INIT_ARGS+=" --xla_tpu_data_parallel_opt_different_sized_ops=true"
fi
unset _overlap
