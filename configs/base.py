"""What every experiment starts from; a config file assigns over it, section by section.

Each section holds the arguments of one constructor, under their own names. A placeholder is None
until it is set.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.name = ""
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.name = "digits"
    config.data.directory = config_dict.placeholder(str)  # of an image folder
    config.data.image_size = 8  # pixels on a side
    config.data.num_channels = 1
    config.data.num_classes = 10
    config.data.random_flip = False
    config.data.batch_size = 64  # over all devices

    config.tokenizer = ml_collections.ConfigDict()
    config.tokenizer.name = "patches"
    config.tokenizer.patch_size = 2
    config.tokenizer.num_codes = 64
    config.tokenizer.path = config_dict.placeholder(str)  # converted weights, of all but "patches"

    config.kl = ml_collections.ConfigDict()
    config.kl.width = 128
    config.kl.multipliers = (1, 1, 2, 2, 4)
    config.kl.num_blocks = 2
    config.kl.latent_channels = 16
    config.kl.latent_scale = 0.2325

    config.vq = ml_collections.ConfigDict()
    config.vq.width = 128
    config.vq.multipliers = (1, 1, 2, 2, 4)
    config.vq.num_blocks = 2
    config.vq.latent_channels = 256
    config.vq.num_codes = 16384
    config.vq.code_width = 8

    config.maskgit_vq = ml_collections.ConfigDict()
    config.maskgit_vq.width = 128
    config.maskgit_vq.multipliers = (1, 1, 2, 2, 4)
    config.maskgit_vq.num_blocks = 2
    config.maskgit_vq.num_codes = 1024
    config.maskgit_vq.code_width = 256

    config.lfq = ml_collections.ConfigDict()
    config.lfq.width = 128
    config.lfq.multipliers = (1, 1, 2, 2, 4)
    config.lfq.num_blocks = 4
    config.lfq.num_bits = 18

    config.backbone = "gpt"

    config.gpt = ml_collections.ConfigDict()
    config.gpt.depth = 12
    config.gpt.width = 768
    config.gpt.num_heads = 12
    config.gpt.mlp_hidden = config_dict.placeholder(int)  # LlamaGen's rule
    config.gpt.num_kv_heads = config_dict.placeholder(int)  # as many as num_heads
    config.gpt.qk_norm = False
    config.gpt.dropout = 0.0
    config.gpt.attention_dropout = 0.0
    config.gpt.remat = "none"
    config.gpt.unroll = 1

    config.mar = ml_collections.ConfigDict()
    config.mar.encoder_depth = 12
    config.mar.encoder_width = 768
    config.mar.encoder_num_heads = 12
    config.mar.decoder_depth = 12
    config.mar.decoder_width = 768
    config.mar.decoder_num_heads = 12
    config.mar.buffer_size = 64
    config.mar.mask_rate_min = 0.7
    config.mar.attention_dropout = 0.1
    config.mar.dropout = 0.1
    config.mar.remat = "none"
    config.mar.unroll = 1

    config.dit = ml_collections.ConfigDict()
    config.dit.depth = 28
    config.dit.width = 1152
    config.dit.num_heads = 16
    config.dit.remat = "none"
    config.dit.unroll = 1

    config.rar = ml_collections.ConfigDict()
    config.rar.depth = 24
    config.rar.width = 768
    config.rar.num_heads = 16
    config.rar.mlp_hidden = 3072
    config.rar.attention_dropout = 0.1
    config.rar.dropout = 0.1
    config.rar.shuffle_start = config_dict.placeholder(int)  # random orders for ever
    config.rar.shuffle_stop = config_dict.placeholder(int)
    config.rar.remat = "none"
    config.rar.unroll = 1

    config.magvit2 = ml_collections.ConfigDict()  # its trunk is in the section gpt
    config.magvit2.factor_sizes = (64, 4096)
    config.magvit2.intra_depth = 2
    config.magvit2.token_dropout = 0.1

    config.captioned = ml_collections.ConfigDict()  # its trunk is in the section gpt
    config.captioned.num_prefix = 120
    config.captioned.caption_width = 2048

    config.diffusion_head = ml_collections.ConfigDict()
    config.diffusion_head.depth = 6
    config.diffusion_head.width = 1024

    config.tensorar = ml_collections.ConfigDict()
    config.tensorar.window = 1
    config.tensorar.depth = 2
    config.tensorar.mlp_ratio = 4
    config.tensorar.drafts = "masked"
    config.tensorar.noise = "categorical"
    config.tensorar.noise_schedule = "exponential"
    config.tensorar.nested = True

    config.loss = ml_collections.ConfigDict()
    config.loss.w_diffusion = 1.0
    config.loss.w_tensor = 0.3
    config.loss.draft_weight = 1.0
    config.loss.label_dropout = 0.1
    config.loss.code_dropout = 0.0
    config.loss.token_dropout = 0.0
    config.loss.num_copies = 4

    config.training = ml_collections.ConfigDict()
    config.training.num_train_steps = 1000
    config.training.num_warmup_steps = 100
    config.training.learning_rate = 1e-4
    config.training.decay = "constant"
    config.training.decay_to = 0.0  # of the learning rate
    config.training.b1 = 0.9
    config.training.b2 = 0.95
    config.training.weight_decay = 0.02
    config.training.decay_head = True  # False spares the denoising MLP
    config.training.clip_norm = 1.0
    config.training.ema_decay = 0.9999
    config.training.num_accumulations = 1
    config.training.dtype = "float32"
    config.training.log_every = 50
    config.training.samples_every = config_dict.placeholder(int)
    config.training.checkpoint_every = 500
    config.training.checkpoints_kept = 2

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = config_dict.placeholder(int)  # all devices that are left
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.sampling = ml_collections.ConfigDict()
    config.sampling.num_ar_steps = 64
    config.sampling.num_buckets = 8
    config.sampling.solver = "ancestral"
    config.sampling.num_head_evaluations = 25
    config.sampling.spacing = "trailing"
    config.sampling.warm_start = config_dict.placeholder(float)
    config.sampling.latent_temperature = 1.0
    config.sampling.clip_latents = config_dict.placeholder(float)
    config.sampling.code_temperature = 1.0
    config.sampling.top_k = config_dict.placeholder(int)
    config.sampling.top_p = config_dict.placeholder(float)
    config.sampling.min_p = config_dict.placeholder(float)
    config.sampling.guidance_scale = 1.0
    config.sampling.guidance_schedule = "constant"
    config.sampling.guidance_power = 1.0  # of the schedule "power_cosine"
    config.sampling.guided_positions = config_dict.placeholder(int)  # all
    # Of a code's factors after the first; as the first's.
    config.sampling.later_guidance_scale = config_dict.placeholder(float)
    config.sampling.later_code_temperature = config_dict.placeholder(float)
    config.sampling.drafts = "off"
    config.sampling.stride = 1

    config.transport = ml_collections.ConfigDict()
    config.transport.kind = "stored"
    config.transport.grouping = "class"
    config.transport.num_atoms = 128
    config.transport.num_directions = 64  # at most; of the kind "residual"
    config.transport.num_sources = 100  # rows per group in the calibration rollout
    config.transport.tau = 1.0
    config.transport.num_jko_steps = 1
    config.transport.epsilon = 0.1
    config.transport.debias = True
    config.transport.num_sinkhorn_iters = 60
    config.transport.max_move = 3.0
    config.transport.inverse_weight = 0.0
    return config
