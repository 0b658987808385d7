"""DeepSpeed's configuration files: the settings of ours that they stand for."""

import difflib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from common import config
from common.config import UserError
from common.options import text
from common.weights import read_json

T = TypeVar("T", bound=Any)

OFFLOAD = ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device")
# key of the file -> our field; bf16 and fp16 are switches over `precision`
FIELDS = {
    "zero_optimization.stage": "shard",
    **dict.fromkeys(OFFLOAD, "offload"),
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "gradient_clipping": "optim.grad_clip",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accum",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.weight_decay": "optim.weight_decay",
    "optimizer.params.betas": "optim.beta2",
    "scheduler.type": "optim.schedule",
    "scheduler.params.warmup_min_lr": "optim.warmup_lr",
    "scheduler.params.warmup_max_lr": "optim.lr",
    "scheduler.params.warmup_num_steps": "optim.warmup_steps",
}
# what values are in our words, where they have others
VALUES: dict[str, dict[Any, Any]] = {
    "zero_optimization.stage": {0: None, 1: None, 2: "grads", 3: "full"},
    **{key: {"none": False, None: False, "cpu": True} for key in OFFLOAD},
    # as transformers pairs them, though DeepSpeed's warm-up is logarithmic where warmup_type is left out
    "scheduler.type": {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear"},
}
# keys without a field, and the values that say what is done here anyway
ONLY: dict[str, tuple[Any, ...]] = {
    "optimizer.type": ("Adam", "AdamW"),  # DeepSpeed's Adam decays weights as AdamW does
    "optimizer.params.eps": (1e-8,),
    "scheduler.params.warmup_type": ("linear",),
    "scheduler.params.total_num_steps": (),
    "fp16.loss_scale": (0,),
}
TOTAL = "train_batch_size"
# section -> keys that change how DeepSpeed computes, not what
IDLE = {
    "": "steps_per_print wall_clock_breakdown dump_state memory_breakdown zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer communication_data_type prescale_gradients gradient_predivide_factor",
    "fp16.": "auto_cast initial_scale_power loss_scale_window loss_scale_window_memory_length hysteresis "
    "consecutive_hysteresis min_loss_scale",
    "zero_optimization.": "overlap_comm contiguous_gradients sub_group_size reduce_bucket_size reduce_scatter "
    "allgather_partitions allgather_bucket_size round_robin_gradients ignore_unused_parameters "
    "model_persistence_threshold stage3_prefetch_bucket_size stage3_param_persistence_threshold "
    "stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save",
    "zero_optimization.offload_optimizer.": "pin_memory buffer_count fast_init pipeline_read pipeline_write ratio",
    "zero_optimization.offload_param.": "pin_memory buffer_count buffer_size max_in_cpu",
    "optimizer.params.": "torch_adam adam_w_mode",
    "activation_checkpointing.": "partition_activations cpu_checkpointing contiguous_memory_optimization "
    "number_checkpoints synchronize_checkpoint_boundary profile",
    "aio.": "block_size queue_depth thread_count single_submit overlap_events",
}
NOT_NEEDED = {section + name for section, names in IDLE.items() for name in names.split()}


def apply(cfg: T, world: int, say: Callable[[str], None]) -> T:
    """`cfg` with what the file of its field `deepspeed` says; "auto" there leaves a setting to the command.

    UserError: the file cannot be followed here, or the command says otherwise.
    """
    if cfg.deepspeed is None:
        return cfg
    file = Path(cfg.deepspeed)
    if not file.is_file():
        raise UserError(f"--deepspeed: {file} not found")
    given = dict(_leaves(read_json(file)))
    values = {key: _ours(file, key, value) for key, value in given.items()}
    said = [key for key in FIELDS if given.get(key, "auto") != "auto"]
    if any(values[key] is True for key in said if key in OFFLOAD):
        # here the parts of weights and of the optimiser go together
        said = [key for key in said if key not in OFFLOAD or values[key]]
    settings = [(f"{file}: {key} {text(given[key])}", FIELDS[key], values[key]) for key in said]
    cfg = config.add(cfg, settings, "deepspeed")
    total, batch = given.get(TOTAL, "auto"), cfg.batch_size * cfg.accum * world
    if total not in ("auto", batch):
        product = f"{cfg.batch_size} x {world} processes x {cfg.accum} accumulated = {batch}"
        raise UserError(f"{file}: {TOTAL} {total}, but the batch is {product}")
    shown = [f"{_short(key)} {text(given[key])} -> {_flag(cfg, FIELDS[key])}" for key in said]
    say(f"{file.name}: {', '.join(shown) or 'leaves all to the command'}")
    if idle := [_short(key) for key in given if key in NOT_NEEDED]:
        say(f"{file.name}: not needed here: {', '.join(idle)}")
    return cfg


def _leaves(node: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested objects."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value


def _ours(file: Path, key: str, value: Any) -> Any:
    """A value in our words. UserError: an unknown key, or a value that nothing here stands for."""
    known = [*FIELDS, *ONLY, *NOT_NEEDED, TOTAL]
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        raise UserError(f"{file}: unknown key {key!r}" + (f" (nearest: {near[0]})" if near else ""))
    if FIELDS.get(key) == "optim.beta2" and isinstance(value, list) and value[:1] == [0.9]:
        return value[-1]
    if value == "auto" or not (key in VALUES or key in ONLY):
        return value
    allowed = [*VALUES.get(key, ONLY.get(key, ()))]
    if value not in allowed:
        names = ", ".join(repr(each) for each in [*allowed, "auto"] if each is not None)
        raise UserError(f"{file}: {key} {value!r} is not offered here (only {names})")
    return VALUES[key][value] if key in VALUES else value


def _short(key: str) -> str:
    return key.removeprefix("zero_optimization.")


def _flag(cfg: Any, field: str) -> str:
    """The flag that says what the config now says of a field."""
    path = "precision" if field in ("bf16", "fp16") else field
    value = functools.reduce(getattr, path.split("."), cfg)
    name = path.rpartition(".")[2].replace("_", "-")
    if value is None or value is False:
        return f"no --{name}"
    shown = f"{value:g}" if isinstance(value, float) else value
    return f"--{name}" if value is True else f"--{name} {shown}"
