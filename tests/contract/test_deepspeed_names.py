"""The private names of DeepSpeed that pipeline/train/engine leans on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import deepspeed
import pytest
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

from tests.support import engine_cases
from tests.support.process_group import ProcessGroup


def test_version_is_the_one_the_layout_was_read_from() -> None:
    assert deepspeed.__version__ == "0.19.8", "read pipeline/train/engine against the new version before changing this"


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (DeepSpeedEngine, ["buffered_allreduce_fallback", "was_step_applied", "get_global_grad_norm", "destroy"]),
        (DeepSpeedZeroOptimizer, ["update_lp_params", "_link_all_hp_params"]),
        (
            DeepSpeedZeroOptimizer_Stage3,
            ["_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters", "get_param_id"],
        ),
    ],
)
def test_methods_exist(owner: type, names: list[str]) -> None:
    assert [name for name in names if not callable(getattr(owner, name, None))] == []


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (DeepSpeedEngine, ["enable_backward_allreduce"]),
        (FP16_UnfusedOptimizer, ["fp16_groups", "fp32_groups"]),
        (DeepSpeedZeroOptimizer, ["single_partition_of_fp32_groups", "_hp_optimizer_states_linked"]),
        (
            DeepSpeedZeroOptimizer_Stage3,
            ["fp32_partitioned_groups_flat", "grad_position", "persistent_parameters", "grad_partitions_flat_buffer"],
        ),
    ],
)
def test_attributes_are_set(owner: type, names: list[str]) -> None:
    source = inspect.getsource(owner)
    assert [name for name in names if f"self.{name}" not in source] == []


def test_fragments_tell_both_addresses() -> None:
    fields = tensor_fragment.__dataclass_fields__
    assert {"lp_fragment_address", "hp_fragment_address"} <= set(fields)
    assert set(fragment_address.__dataclass_fields__) == {"numel", "start"}


@pytest.fixture
def one() -> Iterator[ProcessGroup]:
    group = ProcessGroup(1)
    yield group
    group.close()


def test_optimizers_are_of_the_classes_the_layout_knows(one: ProcessGroup) -> None:
    wrappers = {(z, p): one.run(engine_cases.wrapper, z, p)[0] for z in (0, 1, 2, 3) for p in ("fp32", "bf16")}
    assert wrappers == {
        (0, "fp32"): "AdamW",
        (0, "bf16"): "FP16_UnfusedOptimizer",
        (1, "fp32"): "DeepSpeedZeroOptimizer",
        (1, "bf16"): "DeepSpeedZeroOptimizer",
        (2, "fp32"): "DeepSpeedZeroOptimizer",
        (2, "bf16"): "DeepSpeedZeroOptimizer",
        (3, "fp32"): "DeepSpeedZeroOptimizer_Stage3",
        (3, "bf16"): "DeepSpeedZeroOptimizer_Stage3",
    }
