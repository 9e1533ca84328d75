"""The zoo: names, options, parameter counts, habits borrowed from timm, and training."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dla.models import CifarResNet, create_model, list_models, register_variant
from dla.models.registry import VARIANTS, register_family
from tolerances import MODELS, ROUNDED_MODELS, assert_close, assert_gradients_close

pytestmark = pytest.mark.usefixtures("one_thread")

OFFICIAL = {"spec": "official"}
# For (CIFAR-10, CIFAR-100), which the paper rounds; of DLA and MRLA in the official form.
PARAMETERS = {
    "resnet20_plain": (220_378, 243_508),
    "resnet56_plain": (591_322, 614_452),
    "resnet110_plain": (1_147_738, 1_170_868),
    "resnet20_se": (241_882, 265_012),
    "resnet56_se": (655_834, 678_964),
    "resnet110_se": (1_276_762, 1_299_892),
    "resnet20_eca": (220_404, 243_534),
    "resnet56_eca": (591_400, 614_530),
    "resnet110_eca": (1_147_894, 1_171_024),
    "resnet20_mrla_l": (231_182, 254_312),
    "resnet56_mrla_l": (623_734, 646_864),
    "resnet110_mrla_l": (1_212_562, 1_235_692),
    "resnet20_mrla_b": (230_286, 253_416),
    "resnet56_mrla_b": (621_046, 644_176),
    "resnet110_mrla_b": (1_207_186, 1_230_316),
    "resnet20_dia": (439_226, 462_356),
    "resnet56_dia": (810_170, 833_300),
    "resnet110_dia": (1_366_586, 1_389_716),
    "resnet20_dla_l": (410_158, 433_288),
    "resnet56_dla_l": (802_710, 825_840),
    "resnet110_dla_l": (1_391_538, 1_414_668),
    "resnet20_dla_b": (405_230, 428_360),
    "resnet56_dla_b": (795_990, 819_120),
    "resnet110_dla_b": (1_382_130, 1_405_260),
}
# Tables 4 and 6 of the paper, CIFAR-100: cells other than a model's own.
PARAMETERS_OF_CELLS = [
    ("resnet110_dla_l", {"cell": "dsu", "spec": "official"}, 1_348_588),
    ("resnet110_dla_l", {"cell": "dia", "spec": "official"}, 1_458_572),
    ("resnet110_dla_l", {"cell": "lstm", "spec": "official"}, 1_931_436),
    ("resnet110_dla_l", {"cell": "rnn", "spec": "official"}, 1_412_652),
    ("resnet56_dia", {"cell": "lstm"}, 1_306_164),
    ("resnet110_dia", {"cell": "lstm"}, 1_862_580),
    ("resnet56_dia", {"cell": "dsu_split"}, 789_396),
    ("resnet110_dia", {"cell": "dsu_split"}, 1_345_812),
    ("resnet56_dia", {"cell": "dsu"}, 723_316),
    ("resnet110_dia", {"cell": "dsu"}, 1_279_732),
]
PAPER_PARAMETERS = {
    "resnet20_dla_l": 340_046,
    "resnet56_dla_l": 732_598,
    "resnet110_dla_l": 1_321_426,
}
ATTENTION_MODELS = [
    *(
        (f"resnet20_{variant}", {"spec": spec})
        for variant in ("mrla_l", "mrla_b", "dla_l", "dla_b")
        for spec in ("paper", "official")
    ),
    ("resnet20_dia", {}),
    ("resnet20_dia", {"cell": "dsu"}),
    ("resnet20_dia", {"cell": "dsu_split"}),
    ("resnet20_dla_l", {"spec": "official", "cell": "lstm"}),
    ("resnet20_dla_b", {"spec": "paper", "cell": "rnn"}),
]
ALL_MODELS = [
    *((f"resnet20_{variant}", {}) for variant in ("plain", "se", "eca")),
    *ATTENTION_MODELS,
]


def names_of(cases: list[tuple[str, dict]]) -> list[str]:
    return ["-".join([name, *options.values()]) for name, options in cases]


each_model = pytest.mark.parametrize(("name", "options"), ALL_MODELS, ids=names_of(ALL_MODELS))
each_attention_model = pytest.mark.parametrize(
    ("name", "options"), ATTENTION_MODELS, ids=names_of(ATTENTION_MODELS)
)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def batch(size: int = 16, count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 3, size, size, generator=generator, dtype=dtype)


# --- names and options ---------------------------------------------------------------------------


def test_list_models() -> None:
    names = list_models()
    assert len(names) == len(set(names)) == 6 * len(VARIANTS)
    variants = ("plain", "se", "eca", "dia", "mrla_l", "mrla_b", "dla_l", "dla_b")
    assert names[:8] == [f"resnet20_{variant}" for variant in variants]
    depths = (20, 29, 47, 56, 110, 164)
    assert list_models("*_dla_l") == [f"resnet{depth}_dla_l" for depth in depths]
    assert list_models("nothing*") == []


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    options = {} if name.endswith(("plain", "se", "eca")) else OFFICIAL
    cifar10, cifar100 = PARAMETERS[name]
    assert parameters(create_model(name, **options)) == cifar10
    assert parameters(create_model(name, num_classes=100, **options)) == cifar100


@pytest.mark.parametrize(("name", "options", "count"), PARAMETERS_OF_CELLS, ids=str)
def test_parameter_counts_of_cells(name: str, options: dict, count: int) -> None:
    assert parameters(create_model(name, num_classes=100, **options)) == count


@pytest.mark.parametrize("name", PAPER_PARAMETERS)
def test_parameter_counts_of_the_paper_form(name: str) -> None:
    assert parameters(create_model(name)) == PAPER_PARAMETERS[name]


@pytest.mark.parametrize("name", ["resnet20_mrla_l", "resnet20_mrla_b"])
def test_the_static_model_is_the_same_network_under_both_specs(name: str) -> None:
    paper, official = (create_model(name, spec=s) for s in ("paper", "official"))
    assert paper.state_dict().keys() == official.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("resnet20_plain", "spec"),
        ("resnet20_plain", "fused"),
        ("resnet20_plain", "drop_path"),
        ("resnet20_se", "spec"),
        ("resnet20_eca", "fused"),
        ("resnet20_dia", "head_dim"),
        ("resnet20_dia", "context"),
        ("resnet20_mrla_b", "cell"),
        ("resnet20_mrla_l", "cell"),
        ("resnet20_mrla_l", "reduction"),
        ("resnet20_mrla_l", "context"),
        ("resnet20_dla_l", "depth"),
        ("resnet20_dla_l", "variant"),
    ],
)
def test_an_option_that_does_not_apply_is_a_type_error(name: str, option: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}.*no option '{option}'; .*takes block"):
        create_model(name, **{option: None})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet20_dlal", {}, "did you mean resnet20_dla_l"),
        ("resnet21_dla_l", {}, "name: no model"),
        ("resnet20", {}, "did you mean resnet20_plain, resnet20_se, .*resnet20_dla_b"),
        ("plain", {}, "resnet<depth>_<variant>, .* plain, se, .* list_models"),
        (20, {}, "name: expected a string, got int 20"),
        ("resnet29_plain", {"block": "basic"}, r"block: .* 6n \+ 2, which 29 is not"),
        ("resnet47_dla_l", {"block": "basic"}, r"block: .* 6n \+ 2, which 47 is not"),
        ("resnet20_plain", {"block": "wide"}, "block: expected one of bottleneck, basic"),
        ("resnet20_plain", {"num_classes": -1}, "num_classes: .* got -1"),
        ("resnet20_plain", {"num_classes": 2.5}, "num_classes: .* got float 2.5"),
        ([], {}, "name: expected a string, got list"),
        ("resnet20_dla_l", {"spec": "theirs"}, "spec"),
        ("resnet20_mrla_l", {"spec": "theirs"}, "spec"),
        ("resnet20_dia", {"spec": "theirs", "cell": "dsu"}, "spec"),
        ("resnet20_dia", {"cell": "none"}, "cell"),
        ("resnet20_dla_b", {"activation": "gelu"}, "activation"),
        ("resnet20_dla_l", {"cell": "gru"}, "cell"),
        ("resnet20_dla_l", {"reduction": 1000}, "reduction"),
        ("resnet20_dla_l", {"head_dim": 24}, "head_dim"),
        ("resnet20_dla_l", {"context": "last"}, "context"),
        ("resnet20_dla_l", {"drop_path": 1.5}, "drop_path"),
    ],
)
def test_bad_values_are_named(name: str, options: dict, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        create_model(name, **options)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(3, 32, 32), r"x: expected images \[B, 3, H, W\], got .*\[3, 32, 32\]"),
        (torch.ones(2, 3, 32, 32, dtype=torch.uint8), "x: expected .* floating point, got .*uint8"),
        (torch.rand(2, 1, 32, 32), "expected input.* to have 3 channels, but got 1"),
    ],
    ids=["rank", "dtype", "channels"],
)
def test_bad_images_are_named(variant: str, images: Tensor, words: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
        create_model(f"resnet20_{variant}")(images)


def test_plain_models_are_traced() -> None:
    model = create_model("resnet20_plain").eval()
    assert torch.equal(torch.fx.symbolic_trace(model)(batch()), model(batch()))


def test_depths_must_fit_the_blocks() -> None:
    with pytest.raises(ValueError, match=r"9n \+ 2, which 21 is not"):
        CifarResNet(21)
    with pytest.raises(ValueError, match="variant: expected one of"):
        CifarResNet(20, "other")
    assert create_model("resnet20_plain", block="basic").stages[2].blocks[2].conv2 is not None


def test_a_new_variant_is_one_function() -> None:
    """What later mechanisms rely on: registering is all it takes."""

    @register_variant("twice")
    def twice(blocks: list[nn.Module], channels: int, *, spec: str = "paper") -> nn.Module:
        return VARIANTS["plain"].build_stage(blocks, channels)

    try:
        assert "resnet164_twice" in list_models("*twice")
        assert create_model("resnet20_twice", spec="official")(batch()).shape == (4, 10)
        with pytest.raises(TypeError, match="takes block, spec"):
            create_model("resnet20_twice", fused=True)
        with pytest.raises(ValueError, match="a variant 'twice' already"):
            register_variant("twice")
    finally:
        del VARIANTS["twice"]


def test_families_do_not_take_each_others_names() -> None:
    with pytest.raises(ValueError, match=r"depths: .*'cifar'.*\[56\]"):
        register_family("other", depths=(55, 56), num_classes=10)
    with pytest.raises(ValueError, match="a family 'cifar' already"):
        register_family("cifar", depths=(8,), num_classes=10)


# --- the network as a component ------------------------------------------------------------------


@each_model
@torch.no_grad()
def test_features_and_head(name: str, options: dict) -> None:
    model = create_model(name, **options).eval()
    x = batch(24)
    features = model.forward_features(x)
    assert features.shape == (4, model.num_features, 6, 6)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (4, model.num_features)
    assert torch.equal(model.get_classifier()(pooled), model(x))
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(7)
    assert model(x).shape == (4, 7) and model.num_classes == 7
    assert create_model(name, num_classes=0, **options)(x).shape == (4, model.num_features)


@each_model
@pytest.mark.parametrize("size", [(32, 32), (17, 40), (8, 8), (4, 4)], ids=str)
def test_any_image_size(name: str, options: dict, size: tuple[int, int]) -> None:
    model = create_model(name, **options)
    logits = model(torch.randn(2, 3, *size))
    logits.sum().backward()
    assert logits.shape == (2, 10)


@each_model
def test_feature_info(name: str, options: dict) -> None:
    model = create_model(name, **options).eval()
    seen: dict[str, Tensor] = {}
    for info in model.feature_info:
        module = info["module"]
        model.get_submodule(module).register_forward_hook(
            lambda _, __, out, module=module: seen.update({module: out})
        )
    model(batch(32))
    for info in model.feature_info:
        size = 32 // info["reduction"]
        assert seen[info["module"]].shape == (4, info["num_chs"], size, size)


@each_attention_model
def test_basic_blocks(name: str, options: dict) -> None:
    """Their 16-channel stage is narrower than the default head."""
    model = create_model(name, block="basic", **options)
    logits = model(batch())
    logits.sum().backward()
    assert logits.shape == (4, 10)
    assert all(p.grad is not None for p in model.parameters())


@each_attention_model
def test_every_parameter_gets_a_gradient(name: str, options: dict) -> None:
    """DistributedDataParallel would wait forever for one that does not."""
    model = create_model(name, **options)
    model(batch()).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@each_model
def test_initialisation(name: str, options: dict) -> None:
    torch.manual_seed(0)
    model = create_model(name.replace("20", "56"), **options)
    for key, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), key
        if isinstance(module, nn.Conv2d):
            # The authors count the fan-out of a depthwise convolution as if it were dense.
            groups = module.groups if options.get("spec") != "official" else 1
            fan_out = math.prod(module.kernel_size) * module.out_channels / groups
            expected = math.sqrt(2 / fan_out)
            spread = 6 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(expected, rel=spread), key
            assert module.weight.mean().abs() < 6 * expected / math.sqrt(module.weight.numel()), key


@each_model
def test_copies_compute_the_same(name: str, options: dict) -> None:
    model = create_model(name, **options)
    x = batch()
    model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved(model)):
        assert copied.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(copied.eval()(x), model.eval()(x))
    rebuilt = create_model(name, **options)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt.eval()(x), model.eval()(x))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_attention_model
def test_samples_do_not_see_each_other(name: str, options: dict) -> None:
    model = create_model(name, **options).double().eval()
    x = batch(dtype=torch.float64)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(sample) for sample in x.split(1)])
    assert_close(alone, together, name="logits", table=MODELS)


# --- training ------------------------------------------------------------------------------------


@each_attention_model
def test_fused_and_unfused_train_alike(name: str, options: dict) -> None:
    """Twenty optimizer steps in float64 with drop path: same numbers, names and random draws."""
    losses, states, drawn = {}, {}, {}
    for fused in (True, False):
        torch.manual_seed(3)
        drop_path = {} if name.endswith("dia") else {"drop_path": 0.2}
        model = create_model(name, fused=fused, **drop_path, **options).double().train()
        losses[fused] = train(model, batch(8, 8, torch.float64), steps=20)
        states[fused] = model.state_dict()
        drawn[fused] = torch.rand(1)
    assert_close(losses[True], losses[False], name="losses", table=MODELS)
    assert torch.equal(drawn[True], drawn[False])
    assert states[True].keys() == states[False].keys()
    for key, value in states[False].items():
        if value.is_floating_point():
            assert_close(states[True][key], value, name=key, table=MODELS)


def train(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    target = torch.arange(len(x)) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("context", ["per_sample", "first_sample"])
@pytest.mark.parametrize("cell", ["dsu", "dsu_split", "dia", "lstm", "rnn"])
@pytest.mark.parametrize("spec", ["paper", "official"])
@pytest.mark.parametrize("name", ["resnet20_dla_l", "resnet20_dla_b"])
def test_every_choice_of_dla_fused_and_unfused(
    name: str, spec: str, cell: str, context: str, memory_format: torch.memory_format
) -> None:
    results = {}
    for fused in (True, False):
        torch.manual_seed(5)
        model = create_model(
            name,
            spec=spec,
            cell=cell,
            context=context,
            reduction=8,
            head_dim=16,
            fused=fused,
        ).to(torch.float64, memory_format=memory_format)
        x = batch(dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
        logits = model(x)
        logits.square().sum().backward()
        gradients = {key: p.grad for key, p in model.named_parameters()} | {"x": x.grad}
        results[fused] = logits, gradients
    assert_close(results[True][0], results[False][0], name="logits", table=MODELS)
    assert_gradients_close(results[True][1], results[False][1], case=torch.float64, table=MODELS)


@each_model
def test_autocast(name: str, options: dict) -> None:
    torch.manual_seed(0)
    model = create_model(name, **options)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch())
        loss = logits.float().square().sum()
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_model
@torch.no_grad()
def test_half_precision_inference(name: str, options: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = create_model(name, **options).eval()
    expected = model(batch())
    logits = model.to(dtype)(batch().to(dtype))
    assert_close(logits, expected, dtype=dtype, table=ROUNDED_MODELS)


Compiled = Callable[[Tensor], Tensor]


@pytest.mark.parametrize("spec", ["paper", "official"])
@pytest.mark.parametrize("name", ["resnet20_dla_l", "resnet20_dla_b"])
def test_compiles_without_graph_breaks(name: str, spec: str) -> None:
    torch._dynamo.reset()
    model = create_model(name, spec=spec)
    compiled: Compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    outputs, gradients = [], []
    for network in (compiled, model):
        x = batch().requires_grad_()
        logits = network(x)
        logits.square().sum().backward()
        outputs.append(logits)
        gradients.append({key: p.grad for key, p in network.named_parameters()} | {"x": x.grad})
    assert_close(outputs[0], outputs[1], name="logits", table=MODELS)
    first = {key.removeprefix("_orig_mod."): g for key, g in gradients[0].items()}
    assert_gradients_close(first, gradients[1], case=torch.float32, table=MODELS)


@pytest.mark.parametrize("name", ["resnet20_dla_l", "resnet20_dla_b"])
@torch.no_grad()
def test_export(name: str) -> None:
    """torch.export keeps the fused ops, and serves any batch, also after a round trip by file."""
    model = create_model(name, **OFFICIAL).eval()
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (batch(),), dynamic_shapes=shapes)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert any(target.startswith("dla_kernels.") for target in targets)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    for program in (exported, torch.export.load(buffer)):
        assert_close(program.module()(batch(count=7)), model(batch(count=7)))
