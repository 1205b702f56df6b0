"""All bugs there are, one list."""

from tests.mutations.adapter_bugs import ADAPTER_BUGS
from tests.mutations.average_bugs import AVERAGE_BUGS
from tests.mutations.bad_step_bugs import BAD_STEP_BUGS
from tests.mutations.balance_bugs import BALANCE_BUGS
from tests.mutations.base_bugs import BASE_BUGS
from tests.mutations.begun_bugs import BEGUN_BUGS
from tests.mutations.bias_bugs import BIAS_BUGS
from tests.mutations.bugs import BUGS as MODEL_BUGS
from tests.mutations.chaos_bugs import CHAOS_BUGS
from tests.mutations.coded_bugs import CODED_BUGS
from tests.mutations.compiled_bugs import COMPILED_BUGS
from tests.mutations.config_bugs import CONFIG_BUGS
from tests.mutations.data_bugs import DATA_BUGS
from tests.mutations.dispatch_bugs import DISPATCH_BUGS
from tests.mutations.distill_bugs import DISTILL_BUGS
from tests.mutations.docs_bugs import DOCS_BUGS
from tests.mutations.dora_bugs import DORA_BUGS
from tests.mutations.expert_dora_bugs import EXPERT_DORA_BUGS
from tests.mutations.family_bugs import FAMILY_BUGS
from tests.mutations.generate_bugs import GENERATE_BUGS
from tests.mutations.gpu_bugs import GPU_BUGS
from tests.mutations.head_bugs import HEAD_BUGS
from tests.mutations.head_plan_bugs import HEAD_PLAN_BUGS
from tests.mutations.held_bugs import HELD_BUGS
from tests.mutations.hostile_bugs import HOSTILE_BUGS
from tests.mutations.install_bugs import INSTALL_BUGS
from tests.mutations.kernel_bugs import KERNEL_BUGS
from tests.mutations.kto_bugs import KTO_BUGS
from tests.mutations.layer_bugs import LAYER_BUGS
from tests.mutations.live_bugs import LIVE_BUGS
from tests.mutations.logit_bugs import LOGIT_BUGS
from tests.mutations.long_bugs import LONG_BUGS
from tests.mutations.own_server_bugs import OWN_SERVER_BUGS
from tests.mutations.plan_bugs import PLAN_BUGS
from tests.mutations.planner_bugs import PLANNER_BUGS
from tests.mutations.policy_bugs import POLICY_BUGS
from tests.mutations.preference_bugs import PREFERENCE_BUGS
from tests.mutations.quantised_bugs import QUANTISED_BUGS
from tests.mutations.recipe_bugs import RECIPE_BUGS
from tests.mutations.relora_bugs import RELORA_BUGS
from tests.mutations.report_bugs import REPORT_BUGS
from tests.mutations.rl_bugs import RL_BUGS
from tests.mutations.rl_reward_bugs import RL_REWARD_BUGS
from tests.mutations.row_bugs import ROW_BUGS
from tests.mutations.run_bugs import RUN_BUGS
from tests.mutations.saving_bugs import SAVING_BUGS
from tests.mutations.score_bugs import SCORE_BUGS
from tests.mutations.serve_bugs import SERVE_BUGS
from tests.mutations.shared_bugs import SHARED_BUGS
from tests.mutations.stage_bugs import STAGE_BUGS
from tests.mutations.tokens_bugs import TOKENS_BUGS
from tests.mutations.trained_on_bugs import TRAINED_ON_BUGS
from tests.mutations.tune_bugs import TUNE_BUGS
from tests.mutations.wait_bugs import WAIT_BUGS
from tests.mutations.warm_bugs import WARM_BUGS
from tests.mutations.watch_bugs import WATCH_BUGS
from tests.mutations.whole_bugs import WHOLE_BUGS
from tests.mutations.whole_plan_bugs import WHOLE_PLAN_BUGS

EVERY_BUG = (
    MODEL_BUGS
    + SAVING_BUGS
    + KERNEL_BUGS
    + PLANNER_BUGS
    + PLAN_BUGS
    + HEAD_PLAN_BUGS
    + WHOLE_PLAN_BUGS
    + BASE_BUGS
    + QUANTISED_BUGS
    + HELD_BUGS
    + FAMILY_BUGS
    + LAYER_BUGS
    + DATA_BUGS
    + TOKENS_BUGS
    + ADAPTER_BUGS
    + RUN_BUGS
    + GPU_BUGS
    + WAIT_BUGS
    + HOSTILE_BUGS
    + TRAINED_ON_BUGS
    + TUNE_BUGS
    + COMPILED_BUGS
    + CODED_BUGS
    + DOCS_BUGS
    + DISPATCH_BUGS
    + INSTALL_BUGS
    + HEAD_BUGS
    + LOGIT_BUGS
    + ROW_BUGS
    + LONG_BUGS
    + GENERATE_BUGS
    + REPORT_BUGS
    + CONFIG_BUGS
    + SERVE_BUGS
    + LIVE_BUGS
    + SCORE_BUGS
    + STAGE_BUGS
    + RECIPE_BUGS
    + PREFERENCE_BUGS
    + KTO_BUGS
    + POLICY_BUGS
    + DISTILL_BUGS
    + BALANCE_BUGS
    + RELORA_BUGS
    + RL_BUGS
    + OWN_SERVER_BUGS
    + AVERAGE_BUGS
    + DORA_BUGS
    + BEGUN_BUGS
    + EXPERT_DORA_BUGS
    + SHARED_BUGS
    + WATCH_BUGS
    + BAD_STEP_BUGS
    + WHOLE_BUGS
    + BIAS_BUGS
    + RL_REWARD_BUGS
    + CHAOS_BUGS
    + WARM_BUGS
)
