"""prefopt: from prompts to a model that answers the way you prefer.

    prompts = prefopt.load_prompts("prompts.jsonl")
    candidates = prefopt.sample_candidates(prompts, "Qwen/Qwen3-0.6B", k=4)
    judged = prefopt.judge_comparisons(prefopt.pair_candidates(candidates), judge)
    preferences = prefopt.build_preferences(judged)
    result = prefopt.train_dpo(preferences.groups, "Qwen/Qwen3-0.6B", "adapter")
    report = prefopt.evaluate_model(held_out, "Qwen/Qwen3-0.6B", "adapter", "report")

Names are loaded when they are first used, so `import prefopt` stays fast.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.classic_flow import ClassicConfig as ClassicConfig
    from prefopt.classic_flow import run_classic_flow as run_classic_flow
    from prefopt.data.candidates import load_candidates as load_candidates
    from prefopt.data.dataset_card import dataset_card as dataset_card
    from prefopt.data.demonstrations import Demonstration as Demonstration
    from prefopt.data.demonstrations import demonstrations as demonstrations
    from prefopt.data.demonstrations import load_demonstrations as load_demonstrations
    from prefopt.data.export import export_preferences as export_preferences
    from prefopt.data.general import load_general as load_general
    from prefopt.data.preference_data import load_preferences as load_preferences
    from prefopt.data.preference_data import preference_rows as preference_rows
    from prefopt.data.preference_data import push_preferences as push_preferences
    from prefopt.data.preference_data import save_preferences as save_preferences
    from prefopt.data.preference_data import to_dataset as to_dataset
    from prefopt.data.preflight import preflight as preflight
    from prefopt.data.prompts import load_prompts as load_prompts
    from prefopt.data.prompts import split_by_prompt as split_by_prompt
    from prefopt.data.records import read_records as read_records
    from prefopt.data.records import write_records as write_records
    from prefopt.evaluation.capabilities import compare_capabilities as compare_capabilities
    from prefopt.evaluation.capabilities import measure_capabilities as measure_capabilities
    from prefopt.evaluation.capability_report import CapabilityReport as CapabilityReport
    from prefopt.evaluation.eval_report import EvalReport as EvalReport
    from prefopt.evaluation.eval_report import write_report as write_report
    from prefopt.evaluation.evaluate import compare_models as compare_models
    from prefopt.evaluation.evaluate import evaluate_answers as evaluate_answers
    from prefopt.evaluation.evaluate import evaluate_model as evaluate_model
    from prefopt.evaluation.win_rate import win_rate as win_rate
    from prefopt.flow import FlowConfig as FlowConfig
    from prefopt.flow import run_flow as run_flow
    from prefopt.judges import Judge as Judge
    from prefopt.judges import Rubric as Rubric
    from prefopt.judges import judge_comparisons as judge_comparisons
    from prefopt.judges import load_judge as load_judge
    from prefopt.models import LanguageModel as LanguageModel
    from prefopt.models import LoRASettings as LoRASettings
    from prefopt.models import load_model as load_model
    from prefopt.models import merge_adapter as merge_adapter
    from prefopt.online_flow import OnlineConfig as OnlineConfig
    from prefopt.online_flow import run_online_flow as run_online_flow
    from prefopt.plan import plan_training as plan_training
    from prefopt.plan_config import PlanConfig as PlanConfig
    from prefopt.preferences import build_preferences as build_preferences
    from prefopt.preferences import pair_candidates as pair_candidates
    from prefopt.sampling.api_sampler import AnthropicSampler as AnthropicSampler
    from prefopt.sampling.api_sampler import OpenAISampler as OpenAISampler
    from prefopt.sampling.best_of_n import best_of_n as best_of_n
    from prefopt.sampling.candidates import sample_candidates as sample_candidates
    from prefopt.sampling.sampler import load_sampler as load_sampler
    from prefopt.sampling.settings import SamplingSettings as SamplingSettings
    from prefopt.sampling.vllm_sampler import VLLMSampler as VLLMSampler
    from prefopt.serving.adapter_check import check_adapter as check_adapter
    from prefopt.serving.gguf_file import export_gguf as export_gguf
    from prefopt.serving.gguf_file import export_gguf_adapter as export_gguf_adapter
    from prefopt.serving.hub_push import plan_push as plan_push
    from prefopt.serving.hub_push import push as push
    from prefopt.training.dpo import DPOSettings as DPOSettings
    from prefopt.training.dpo import train_dpo as train_dpo
    from prefopt.training.dpo_trainer import DPOConfig as DPOConfig
    from prefopt.training.dpo_trainer import DPOTrainer as DPOTrainer
    from prefopt.training.health_watch import HealthWatch as HealthWatch
    from prefopt.training.judge_win_rate import JudgeWinRate as JudgeWinRate
    from prefopt.training.online_dpo_trainer import OnlineDPOConfig as OnlineDPOConfig
    from prefopt.training.online_dpo_trainer import OnlineDPOTrainer as OnlineDPOTrainer
    from prefopt.training.ppo import PPOSettings as PPOSettings
    from prefopt.training.ppo import train_ppo as train_ppo
    from prefopt.training.ppo_callbacks import PPOHealthWatch as PPOHealthWatch
    from prefopt.training.ppo_trainer import PPOConfig as PPOConfig
    from prefopt.training.ppo_trainer import PPOTrainer as PPOTrainer
    from prefopt.training.progress_bar import ProgressBar as ProgressBar
    from prefopt.training.replay import own_answers as own_answers
    from prefopt.training.reward import RewardSettings as RewardSettings
    from prefopt.training.reward import evaluate_reward_model as evaluate_reward_model
    from prefopt.training.reward import train_reward as train_reward
    from prefopt.training.reward_model import RewardModel as RewardModel
    from prefopt.training.reward_report import RewardReport as RewardReport
    from prefopt.training.reward_trainer import RewardConfig as RewardConfig
    from prefopt.training.reward_trainer import RewardTrainer as RewardTrainer
    from prefopt.training.sampled_answers import SampledAnswers as SampledAnswers
    from prefopt.training.sft import SFTSettings as SFTSettings
    from prefopt.training.sft import train_sft as train_sft
    from prefopt.types import Candidate as Candidate
    from prefopt.types import Comparison as Comparison
    from prefopt.types import JudgedComparison as JudgedComparison
    from prefopt.types import Preference as Preference
    from prefopt.types import PreferenceGroup as PreferenceGroup
    from prefopt.types import Prompt as Prompt
    from prefopt.types import Verdict as Verdict

_HOMES = {
    "ClassicConfig": "classic_flow",
    "OnlineConfig": "online_flow",
    "OnlineDPOConfig": "training.online_dpo_trainer",
    "OnlineDPOTrainer": "training.online_dpo_trainer",
    "run_online_flow": "online_flow",
    "run_classic_flow": "classic_flow",
    "dataset_card": "data.dataset_card",
    "Demonstration": "data.demonstrations",
    "demonstrations": "data.demonstrations",
    "load_candidates": "data.candidates",
    "load_demonstrations": "data.demonstrations",
    "export_preferences": "data.export",
    "load_general": "data.general",
    "load_preferences": "data.preference_data",
    "preference_rows": "data.preference_data",
    "push_preferences": "data.preference_data",
    "save_preferences": "data.preference_data",
    "to_dataset": "data.preference_data",
    "preflight": "data.preflight",
    "load_prompts": "data.prompts",
    "split_by_prompt": "data.prompts",
    "read_records": "data.records",
    "write_records": "data.records",
    "compare_capabilities": "evaluation.capabilities",
    "measure_capabilities": "evaluation.capabilities",
    "CapabilityReport": "evaluation.capability_report",
    "EvalReport": "evaluation.eval_report",
    "write_report": "evaluation.eval_report",
    "compare_models": "evaluation.evaluate",
    "evaluate_answers": "evaluation.evaluate",
    "evaluate_model": "evaluation.evaluate",
    "win_rate": "evaluation.win_rate",
    "FlowConfig": "flow",
    "run_flow": "flow",
    "Judge": "judges",
    "Rubric": "judges",
    "judge_comparisons": "judges",
    "load_judge": "judges",
    "LanguageModel": "models",
    "LoRASettings": "models",
    "load_model": "models",
    "merge_adapter": "models",
    "PlanConfig": "plan_config",
    "plan_training": "plan",
    "build_preferences": "preferences",
    "pair_candidates": "preferences",
    "best_of_n": "sampling.best_of_n",
    "SamplingSettings": "sampling.settings",
    "AnthropicSampler": "sampling.api_sampler",
    "OpenAISampler": "sampling.api_sampler",
    "VLLMSampler": "sampling.vllm_sampler",
    "load_sampler": "sampling.sampler",
    "sample_candidates": "sampling.candidates",
    "check_adapter": "serving.adapter_check",
    "export_gguf": "serving.gguf_file",
    "export_gguf_adapter": "serving.gguf_file",
    "plan_push": "serving.hub_push",
    "push": "serving.hub_push",
    "HealthWatch": "training.health_watch",
    "JudgeWinRate": "training.judge_win_rate",
    "ProgressBar": "training.progress_bar",
    "SampledAnswers": "training.sampled_answers",
    "DPOConfig": "training.dpo_trainer",
    "DPOTrainer": "training.dpo_trainer",
    "own_answers": "training.replay",
    "RewardSettings": "training.reward",
    "evaluate_reward_model": "training.reward",
    "train_reward": "training.reward",
    "RewardModel": "training.reward_model",
    "RewardReport": "training.reward_report",
    "RewardConfig": "training.reward_trainer",
    "RewardTrainer": "training.reward_trainer",
    "DPOSettings": "training.dpo",
    "train_dpo": "training.dpo",
    "PPOHealthWatch": "training.ppo_callbacks",
    "PPOSettings": "training.ppo",
    "train_ppo": "training.ppo",
    "PPOConfig": "training.ppo_trainer",
    "PPOTrainer": "training.ppo_trainer",
    "SFTSettings": "training.sft",
    "train_sft": "training.sft",
    "Candidate": "types",
    "Comparison": "types",
    "JudgedComparison": "types",
    "Preference": "types",
    "PreferenceGroup": "types",
    "Prompt": "types",
    "Verdict": "types",
}

__all__ = [*_HOMES, "__version__"]
try:
    __version__ = version("prefopt")
except PackageNotFoundError:  # a checkout on the path, where nothing can be installed
    __version__ = "0+checkout"


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module 'prefopt' has no attribute {name!r}")
    value = getattr(import_module(f"prefopt.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
