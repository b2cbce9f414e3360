"""AdaLoRA's orthogonality, importance and budget, each against PEFT's own, and updates on the device."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator

import edgepeft
from edgepeft.adapters import Adapter, load_adapter, save_adapter
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import AdapterError, UpdateRejectedError, UsageError
from edgepeft.runtime.adapters.onnx_adapter import read_onnx_adapter, write_onnx_adapter
from edgepeft.runtime.memory.planner import plans
from edgepeft.runtime.training.options import TrainingOptions
from edgepeft.runtime.training.starting import fresh_adapter, trained_names
from edgepeft.runtime.training.state.buffers import TrainingState
from edgepeft.runtime.training.techniques.adalora import AdaLoraSteps
from edgepeft.runtime.training.workload import workload
from edgepeft.slots import PREFIX
from edgepeft.techniques import adalora
from edgepeft.techniques.adalora import E
from edgepeft.techniques.lora import A, B

from ..interrupting import resumed, same_tensors
from ..sharing import Shared
from ..training.test_learning import records, step_by_step, torch_losses
from . import parity
from .test_parity import adapted

SIZES = {"first": (8, 12), "second": (20, 6), "third": (12, 12)}
TARGETS = parity.TARGETS["llama"]
MODULES = 6
"""Of the small Llama: three in each of two layers."""


class _Factors(torch.nn.Module):
    """What a linear of PEFT's has of AdaLoRA."""

    def __init__(self, rank: int, in_features: int, out_features: int) -> None:
        super().__init__()
        shapes = {"lora_A": (rank, in_features), "lora_B": (out_features, rank), "lora_E": (rank, 1)}
        for name, shape in shapes.items():
            parameter = torch.nn.Parameter(torch.randn(*shape))
            setattr(self, name, torch.nn.ParameterDict({"default": parameter}))


class _Both:
    """PEFT's allocator and the device's, of the same factors."""

    def __init__(self, passing: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        self.config = peft.AdaLoraConfig(**options)
        rank = self.config.init_r
        self.model = torch.nn.ModuleDict({name: _Factors(rank, *sizes) for name, sizes in SIZES.items()})
        self.allocator = RankAllocator(self.model, self.config, "default")
        self.peft = SimpleNamespace(
            peft_config={"default": self.config},
            trainable_adapter_name="default",
            rankallocator=self.allocator,
            model=self.model,
        )
        self.slots = [adalora.new_slot(name, *sizes, 3) for name, sizes in SIZES.items()]
        self.parameters = dict(self.model.named_parameters())
        tensors = {self.key(name): value.detach().numpy() for name, value in self.parameters.items()}
        config = self.config.to_dict() | {"peft_type": "ADALORA"}
        self.adapter = Adapter(config, tensors)
        start = {key: np.ascontiguousarray(value.T) for key, value in tensors.items()}
        self.state = TrainingState(start, passing=passing, averages=AdaLoraSteps.averages)
        self.steps = AdaLoraSteps(self.adapter, self.slots, self.state, {})

    def key(self, name: str) -> str:
        return PREFIX + name.removesuffix(".default")

    def step(self, number: int, clip_coef: float) -> None:
        """New values and gradients on both sides, and what follows a step of the optimizer."""
        names = list(self.state.parameters)
        for name, parameter in self.parameters.items():
            parameter.data += 0.1 * torch.randn_like(parameter)
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient * clip_coef
            self.state.replace(self.key(name), parameter.data.numpy().T.copy())
            self.state.put_gradient(self.key(name), gradient.numpy().T.copy())
        peft.AdaLoraModel.update_and_allocate(self.peft, number)
        for part in (names[:4], names[4:]):
            self.steps.after_update(part, number, clip_coef)
        self.steps.after_step(number)
        if self.state.passes_gradients:
            self.state.drop_gradients(names)

    def singular_values(self, slot: Any) -> tuple[np.ndarray, np.ndarray]:
        """Those of the device and PEFT's."""
        theirs = self.parameters[f"{slot.module}.lora_E.default"].detach().numpy()
        return self.state.parameters[slot.input(E)].T, theirs


@pytest.mark.parametrize("passing", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"total_step": 30, "tinit": 5, "tfinal": 8, "deltaT": 3},
        {"total_step": 25, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.5, "beta2": 0.95},
        {"total_step": 12, "tinit": 0, "tfinal": 10, "deltaT": 100},
    ],
)
def test_averages_and_ranks_are_pefts_after_every_step(options: dict[str, Any], passing: bool) -> None:
    """And the budget is met in the steps that allocate, whichever way gradients come."""
    both = _Both(passing, init_r=6, target_r=3, **options)
    last = options["total_step"] - options["tfinal"]
    for number in range(1, options["total_step"] + 1):
        both.step(number, clip_coef=1.0 if number % 3 else 0.25)
        budget, allocates = both.allocator.budget_schedule(number)
        for slot in both.slots:
            ours, theirs = both.singular_values(slot)
            assert np.array_equal(ours == 0, theirs == 0), f"step {number}"
            for ours_kind, theirs_all in (
                ("importance", both.allocator.exp_avg_ipt),
                ("uncertainty", both.allocator.exp_avg_unc),
            ):
                for name, suffix in ((A, "lora_A"), (B, "lora_B"), (E, "lora_E")):
                    if number < last:
                        average = both.state.average(ours_kind, slot.input(name)).T
                        expected = theirs_all[f"{slot.module}.{suffix}.default"].numpy()
                        np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)
        if (allocates and number < last) or number >= last:
            kept = sum(int((both.singular_values(slot)[0] != 0).sum()) for slot in both.slots)
            assert kept == (budget if number < last else 3 * len(SIZES)), f"step {number}"


def test_the_orthogonality_is_pefts() -> None:
    """Its value and its gradient, added to what is there."""
    both = _Both(init_r=6, target_r=3, total_step=30, orth_reg_weight=0.7)
    terms = []
    for name, parameter in both.parameters.items():
        if "lora_E" not in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram))))
    loss = 0.7 * sum(terms) / len(terms)
    loss.backward()
    names = list(both.state.parameters)
    for name in names:
        both.state.put_gradient(name, np.ones_like(both.state.parameters[name]))
    got = sum(both.steps.before_update(part) for part in (names[:4], names[4:]))
    assert got == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in both.parameters.items():
        expected = 1.0 if parameter.grad is None else 1.0 + parameter.grad.numpy().T
        got_gradient = both.state.gradients[both.key(name)]
        np.testing.assert_allclose(got_gradient, np.broadcast_to(expected, got_gradient.shape), atol=1e-5)


def test_where_an_alpha_of_zero_means_the_rank_nothing_changes_at_the_end() -> None:
    """PEFT's factor is then what is left of the rank, divided by what there was."""
    both = _Both(init_r=6, target_r=3, total_step=4, lora_alpha=0)
    for number in range(1, 5):
        both.step(number, clip_coef=1.0)
    trained = {name: np.ascontiguousarray(value.T) for name, value in both.state.parameters.items()}
    before = both.adapter.with_tensors(trained, "trained")
    after = both.steps.finished(before)
    for slot in both.slots:
        a, b, e = ([adapter.tensors[slot.input(name)] for adapter in (before, after)] for name in (A, B, E))
        products = [
            adapter.scaling(slot.module) * b[index] @ (a[index] * e[index])
            for index, adapter in enumerate((before, after))
        ]
        np.testing.assert_allclose(products[1], products[0], atol=1e-5)
        assert a[0].shape[0] == 6


@pytest.fixture(scope="module")
def bundle(shared: Shared) -> Path:
    """The folder with the bundle `b` and adapters that PEFT made, `a` and, with a pattern, `allocated`."""

    def export(root: Path) -> None:
        parity.write("adalora", "llama", 32, root)
        parity.save("adalora, allocated", "llama", root / "allocated")

    return shared("adalora", export)


def update(path: Path, output: Path, steps: int, **options: Any) -> Any:
    return adapted(path, output, "llama", steps, **options)


def ranks(adapter: Adapter) -> dict[str, int]:
    return {module: adapter.rank(module) for module in adapter.modules}


@pytest.mark.parametrize("strategy", ["resident", "checkpointed", "streamed"])
def test_ranks_by_layer_are_pefts_on_the_same_run(bundle: Path, tmp_path: Path, strategy: str) -> None:
    """The same adapter, batches and steps in PyTorch + PEFT."""
    folder = tmp_path / "a"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(4)
        config = peft.AdaLoraConfig(
            init_r=8, target_r=4, total_step=60, tinit=6, tfinal=15, deltaT=3, lora_alpha=16,
            target_modules=TARGETS, task_type="CAUSAL_LM",
        )  # fmt: skip
        peft.get_peft_model(parity.FAMILIES["llama"](), config).save_pretrained(str(folder))
    model = parity.in_torch("llama", bundle / "b", folder, trains=True)
    expected = torch_losses(model, records("llama-tied"), 60)
    pattern = model.peft_config["default"].rank_pattern
    theirs = {name.partition(".lora_E")[0]: sum(mask) for name, mask in pattern.items()}
    path = step_by_step(bundle / "b", tmp_path / "b")
    report = update(path, tmp_path / "out", 60, adapter=str(folder), strategy=strategy)
    np.testing.assert_allclose(report.losses, expected, rtol=0.01)
    found = ranks(load_adapter(tmp_path / "out"))
    assert sum(found.values()) == sum(theirs.values()) == 4 * MODULES
    assert found.keys() == theirs.keys()
    assert max(abs(found[module] - theirs[module]) for module in found) <= 1, (found, theirs)
    assert len(set(found.values())) > 1, "all layers kept the same"


def test_a_fresh_one_ends_on_its_budget_and_opens_in_peft(bundle: Path, tmp_path: Path) -> None:
    path = step_by_step(bundle / "b", tmp_path / "b")
    report = update(path, tmp_path / "out", 40, method="adalora", rank=4, learning_rate=1e-2)
    assert report.chosen == "trained"
    adapter = load_adapter(tmp_path / "out")
    config = adapter.config
    expected = {"init_r": 6, "target_r": 4, "total_step": 40, "tinit": 4, "tfinal": 8, "deltaT": 1}
    assert {name: config[name] for name in expected} == expected
    assert sum(ranks(adapter).values()) == 4 * MODULES
    assert {f"{module}.lora_E": rank for module, rank in ranks(adapter).items()} == {
        key: sum(mask) for key, mask in config["rank_pattern"].items()
    }
    reopened = parity.in_torch("llama", bundle / "b", tmp_path / "out")
    with edgepeft.load(bundle / "b") as device:
        assert parity.difference(device, "llama", tmp_path / "out", reopened) <= 1e-4
        with reopened.disable_adapter():
            assert parity.difference(device, "llama", tmp_path / "out", reopened) > 1e-3


@pytest.mark.parametrize("at", [9, 33])
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "resident"},
        {"strategy": "streamed", "max_grad_norm": 0.0, "optimizer_state": "8bit"},
        {"strategy": "checkpointed", "accumulation_steps": 2},
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    bundle: Path, tmp_path: Path, options: dict[str, Any], at: int
) -> None:
    """Killed while ranks fall, and when they are chosen."""
    data = records("llama-tied")
    options = {
        "method": "adalora", "rank": 4, "steps": 40, "batch_size": 4, "seq_len": 16, "learning_rate": 1e-2,
    } | options  # fmt: skip
    with edgepeft.load(bundle / "b", threads=1) as device:
        whole = device.adapt(data, tmp_path / "whole", **options)
        again = resumed(device, data, tmp_path / "again", at=at, **options)
    assert again.losses == whole.losses
    assert same_tensors(tmp_path / "again", tmp_path / "whole")
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("again", "whole")
    ]
    assert configs[0] == configs[1]


def test_averages_move_to_a_file_with_the_state(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that steps down, to the last plan that there is, shares its ranks out alike."""
    options = {"method": "adalora", "rank": 4, "learning_rate": 1e-2, "max_grad_norm": 0.0}
    path = step_by_step(bundle / "b", tmp_path / "b")
    kept = update(path, tmp_path / "kept", 40, strategy="resident", **options)
    monkeypatch.setattr("edgepeft.runtime.training.adapt.NEAR", 0.0)
    moved = update(path, tmp_path / "moved", 40, **options)
    ways = [change.after for change in moved.stepped_down]
    assert ways[-1].startswith("streamed, state in a file, updated stage by stage")
    assert moved.stepped_down[-1].step < 40 // 2
    np.testing.assert_allclose(moved.losses, kept.losses, rtol=1e-4)
    assert ranks(load_adapter(tmp_path / "moved")) == ranks(load_adapter(tmp_path / "kept"))


def test_what_has_its_budget_keeps_its_ranks(bundle: Path, tmp_path: Path) -> None:
    """A second update of a finished adapter; its configuration stays, and PEFT opens it."""
    path = step_by_step(bundle / "b", tmp_path / "b")
    update(path, tmp_path / "one", 40, method="adalora", rank=4, learning_rate=1e-2)
    update(path, tmp_path / "two", 6, adapter=str(tmp_path / "one"), learning_rate=1e-3)
    one, two = (load_adapter(tmp_path / name) for name in ("one", "two"))
    assert one.config == two.config
    assert not same_tensors(tmp_path / "one", tmp_path / "two")
    reopened = parity.in_torch("llama", bundle / "b", tmp_path / "two")
    with edgepeft.load(bundle / "b") as device:
        assert parity.difference(device, "llama", tmp_path / "two", reopened) <= 1e-4


def test_a_half_allocated_one_goes_on_from_the_ranks_that_it_has(bundle: Path, tmp_path: Path) -> None:
    """Whose pattern is then of `init_r` ranks again."""
    start = load_adapter(bundle / "allocated")
    folder = tmp_path / "start"
    folder.mkdir()
    for file in (bundle / "allocated").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    before = sum(ranks(start).values())
    assert before > 2 * MODULES
    path = step_by_step(bundle / "b", tmp_path / "b")
    update(path, tmp_path / "out", 30, adapter=str(folder), learning_rate=1e-3)
    found = load_adapter(tmp_path / "out")
    assert sum(ranks(found).values()) == 2 * MODULES
    for key, mask in found.config["rank_pattern"].items():
        assert all(had or not has for had, has in zip(start.config["rank_pattern"][key], mask, strict=True))
    reopened = parity.in_torch("llama", bundle / "b", tmp_path / "out")
    with edgepeft.load(bundle / "b") as device:
        assert parity.difference(device, "llama", tmp_path / "out", reopened) <= 1e-4


def test_what_cannot_share_ranks_out_is_refused(bundle: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"method": "adalora", "strategy": "forward-only"}, "AdaLoRA needs gradients, which forward-only"),
        ({"method": "adalora", "top_blocks": 1}, "shares its ranks out among all its modules"),
        ({"adapter": "a", "steps": 9}, r"\(tinit\) and until 5 before the end .* at least --steps 10"),
    ):
        with pytest.raises(UsageError, match=message):
            update(bundle / "b", tmp_path / "out", **{"steps": 20} | options)


def test_a_bound_on_the_change_is_kept(bundle: Path, tmp_path: Path) -> None:
    """Singular values that are taken out change an adapter that has some: more than a policy may allow."""
    path = step_by_step(bundle / "b", tmp_path / "b")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["policy"]["max_relative_change"] = 0.01
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UpdateRejectedError, match=r"step 6: what .* of its norm, .* allows 0.01"):
        update(path, tmp_path / "out", 20, adapter="a")


def test_the_plan_counts_both_averages_and_no_estimates(bundle: Path) -> None:
    opened = open_bundle(bundle / "b")
    adapter = fresh_adapter(opened, 4, 0, "adalora")
    options = TrainingOptions(method="adalora")
    names = trained_names(opened.manifest, adapter, options)
    sizes = workload(adapter, names, 8, 16, options)
    assert sizes.moment_bytes == 8 + 2 * 4
    found = plans(opened.manifest, sizes, 0)
    assert all(plan.exact for plan in found)
    assert found[0].state_bytes > (4 + 4 + 4 + 16) * sizes.trained_values


@pytest.mark.parametrize("method", ["adalora", "adalora, allocated"])
def test_onnxruntimes_format_loses_nothing(bundle: Path, tmp_path: Path, method: str) -> None:
    opened = open_bundle(bundle / "b")
    original = load_adapter(bundle / ("a" if method == "adalora" else "allocated"))
    write_onnx_adapter(opened, original, tmp_path / "x.onnx_adapter")
    back = read_onnx_adapter(opened, tmp_path / "x.onnx_adapter")
    for module in back.modules:
        assert np.float32(back.scaling(module)) == np.float32(original.scaling(module))
    assert {key for key, value in original.tensors.items() if value.size} == back.tensors.keys()
    assert all(np.array_equal(back.tensors[key], original.tensors[key]) for key in back.tensors)
    save_adapter(back, tmp_path / "back")
    reopened = parity.in_torch("llama", bundle / "b", tmp_path / "back")
    with edgepeft.load(bundle / "b") as device:
        assert parity.difference(device, "llama", original.origin, reopened) <= 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_step": None}, "total_step is None, expected a whole number"),
        ({"beta1": 1}, "beta1 is 1, expected between 0 and 1"),
        ({"orth_reg_weight": -1}, "orth_reg_weight is -1"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"init_r": 7}, "the configuration gives it rank 7"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\], expected an object"),
        ({"rank_pattern": {"first.lora_E": [True]}}, r"expected 6 times \(init_r\) true or false"),
        ({"rank_pattern": {"first.lora_E": [1] * 6}}, r"expected 6 times \(init_r\) true or false"),
        (
            {"rank_pattern": {"first.lora_E": [True, False] * 3}},
            r"first: lora_A, lora_B and lora_E are .* rank 3",
        ),
    ],
)
def test_a_configuration_that_is_none_is_refused(changes: dict[str, Any], message: str) -> None:
    adapter = _Both(init_r=6, target_r=3, total_step=30).adapter
    with pytest.raises(AdapterError, match=message):
        Adapter(adapter.config | changes, adapter.tensors)
