"""Which check serves which archive, by the prefix of its name."""

import checks_captioned
import checks_diffusion
import checks_evaluation
import checks_gpt
import checks_inception
import checks_kl
import checks_magvit2
import checks_mar
import checks_rar
import checks_vq

CHECKS = {
    **checks_captioned.CHECKS,
    **checks_diffusion.CHECKS,
    **checks_evaluation.CHECKS,
    **checks_gpt.CHECKS,
    **checks_inception.CHECKS,
    **checks_kl.CHECKS,
    **checks_magvit2.CHECKS,
    **checks_mar.CHECKS,
    **checks_rar.CHECKS,
    **checks_vq.CHECKS,
}
