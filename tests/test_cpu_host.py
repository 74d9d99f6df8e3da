"""Megatron's real loop on CPU ranks: layouts train alike, checkpoints cross them, resume is exact.

One process trains six iterations and saves every second one. Each layout then loads iteration 2
(model and optimizer, resharded) and must log the same losses for iterations 3 to 6. They are
compared at a relative 1e-5: float32 sums in another order, printed with seven digits.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.ranks import parse_losses, run_pretrain, run_ranks
from megatron_cpo.host import cpu as cpu_host
from tests.commands import run_python
from tests.corpora import write_corpus

LAYERS, HEADS, HIDDEN, TOKENS, VOCAB = 4, 4, 32, 16, 60

TRAIN = [
    *("--num-layers", LAYERS, "--num-attention-heads", HEADS, "--hidden-size", HIDDEN),
    *("--seq-length", TOKENS, "--max-position-embeddings", TOKENS),
    *("--micro-batch-size", 1, "--global-batch-size", 4, "--train-iters", 6, "--lr", 1e-3),
    *("--log-interval", 1, "--eval-interval", 2, "--eval-iters", 1, "--split", "50,50,0"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", VOCAB),
    # Megatron's softmax includes the padded rows: both TP=1 and TP=2 must pad 61 tokens to 64.
    *("--make-vocab-size-divisible-by", 32),
    "--use-distributed-optimizer",
]
RESHARD = [  # what it takes to compare layouts
    *("--hidden-dropout", 0, "--attention-dropout", 0),
    # Without this option optimizer states cross data-parallel sizes, but not TP and PP.
    "--dist-ckpt-optim-fully-reshardable",
]
TP2 = ["--tensor-model-parallel-size", 2]
PP2 = ["--pipeline-model-parallel-size", 2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Flags that name a small corpus on disk and a cache for its index."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), VOCAB)


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """Checkpoints at iterations 2, 4 and 6 of one process, and what it logged."""
    folder = tmp_path_factory.mktemp("reference")
    output = run_pretrain([*TRAIN, *corpus, *RESHARD, *saving(folder)], 1)
    return folder, parse_losses(output[0])


def saving(folder: Path) -> list:
    return ["--save", folder, "--save-interval", 2]


def loading(folder: Path, iteration: int) -> list:
    return ["--load", folder, "--ckpt-step", iteration]


def assert_equal_as_printed(got: list[float], expected: list[float]) -> None:
    """Equal up to the last of the seven digits that Megatron prints."""
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def assert_same_curve(got: dict, reference: dict, start: int) -> None:
    """Training and validation losses after iteration `start` agree."""
    assert len(got["lm loss"]) == 6 - start
    for name in ("lm loss", "lm loss value"):  # the second is the evaluation's
        np.testing.assert_allclose(got[name], reference[name][-len(got[name]) :], rtol=1e-5)
    np.testing.assert_allclose(got["grad norm"], reference["grad norm"][start:], rtol=2e-3)


def test_one_process_learns_and_resumes_exactly(corpus, reference):
    folder, curve = reference
    assert len(curve["lm loss"]) == 6
    assert curve["lm loss"][-1] < curve["lm loss"][0]
    assert not any(curve["number of nan iterations"])
    output = run_pretrain([*TRAIN, *corpus, *RESHARD, *loading(folder, 2)], 1)
    resumed = parse_losses(output[0])
    assert_equal_as_printed(resumed["lm loss"], curve["lm loss"][2:])
    assert resumed["grad norm"] == curve["grad norm"][2:]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([*PP2, "--num-layers-per-virtual-pipeline-stage", 1], id="vpp"),
        pytest.param([], id="dp"),
        pytest.param(
            ["--overlap-grad-reduce", "--overlap-param-gather", "--num-workers", 1],
            id="dp-overlap-workers",
        ),
    ],
)
def test_every_layout_trains_like_one_process(corpus, reference, layout):
    folder, curve = reference
    output = run_pretrain([*TRAIN, *corpus, *RESHARD, *loading(folder, 2), *layout], 2)
    assert_same_curve(parse_losses(output[-1]), curve, start=2)


def test_tensor_parallel_checkpoint_continues_in_a_pipeline(corpus, reference, tmp_path):
    """One process to TP=2 at iteration 2, TP=2 to PP=2 at iteration 4: still one curve."""
    folder, curve = reference
    common = [*TRAIN, *corpus, *RESHARD]
    output = run_pretrain([*common, *TP2, *loading(folder, 2), *saving(tmp_path)], 2)
    assert_same_curve(parse_losses(output[-1]), curve, start=2)
    output = run_pretrain([*common, *PP2, *loading(tmp_path, 4)], 2)
    assert_same_curve(parse_losses(output[-1]), curve, start=4)


def test_resume_restores_the_dropout_generators(corpus, tmp_path):
    """With dropout the curve depends on the generators, tensor-parallel ones included."""
    common = [*TRAIN, *corpus, *TP2]
    whole = parse_losses(run_pretrain([*common, *saving(tmp_path)], 2)[-1])
    resumed = parse_losses(run_pretrain([*common, *loading(tmp_path, 4)], 2)[-1])
    assert_equal_as_printed(resumed["lm loss"], whole["lm loss"][4:])
    other = parse_losses(run_pretrain([*common, *loading(tmp_path, 4), "--no-load-rng"], 2)[-1])
    assert abs(other["lm loss"][0] - whole["lm loss"][4]) > 1e-4


def test_bf16_and_tensorboard(corpus, tmp_path):
    pytest.importorskip("tensorboard", reason="the dev extra installs it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--bf16", "--tensorboard-dir", tmp_path, "--log-memory-to-tensorboard"]
    output = run_pretrain([*TRAIN, *corpus, *flags], 2)
    events = EventAccumulator(str(tmp_path)).Reload()
    logged = [event.value for event in events.Scalars("lm loss")]
    assert_equal_as_printed(logged, parse_losses(output[-1])["lm loss"])


def redirected() -> dict:
    """What Megatron asks of CUDA, asked on a rank with the CPU host on."""
    device = torch.device("cuda", torch.cuda.current_device())
    made = [torch.zeros(2, device=where) for where in ("cuda", "cuda:0", 0, device)]
    made += [made[0].to(where) for where in ("cuda", 0, device)]
    made += [
        made[0].cuda(),
        torch.empty_like(made[0], device="cuda"),
        made[0].new_ones(1, device=0),
    ]
    module = torch.nn.Linear(1, 1).cuda(0).to(device).to("cuda")
    torch.cuda.manual_seed_all(7)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(1, device="cuda")
    torch.cuda.set_rng_state(state)
    with torch.cuda.stream(torch.cuda.Stream()) as stream:
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    return {
        "devices": {tensor.device.type for tensor in [*made, *module.parameters()]},
        "kept": made[0].to(torch.float64).to("meta").device.type,
        "type": made[0].type(),
        "cast": made[0].type(torch.int).dtype,
        "redrawn": torch.equal(drawn, torch.rand(1, device="cuda")),
        "is_available": torch.cuda.is_available(),
        "stream": stream is not None and torch.cuda.Event(enable_timing=True).query(),
    }


def test_cuda_calls_are_answered_on_the_cpu():
    assert run_ranks(redirected, 1) == [
        {
            "devices": {"cpu"},
            "kept": "meta",
            "type": "torch.cuda.FloatTensor",
            "cast": torch.int32,
            "redrawn": True,
            "is_available": False,
            "stream": True,
        }
    ]


def unknown_flags() -> set:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    cpu_host.set_parser_defaults(parser)
    cpu_host.check_args(parser.parse_args([]))
    options = {option for action in parser._actions for option in action.option_strings}
    dests = {action.dest for action in parser._actions}
    return (set(cpu_host.CUDA_FLAGS.values()) - options) | (
        {*cpu_host.CPU_FLAGS, *cpu_host.CUDA_FLAGS} - dests
    )


def test_every_flag_we_speak_of_is_megatrons():
    assert run_ranks(unknown_flags, 1) == [set()]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"transformer_impl": "transformer_engine"}, "--transformer-impl is 'transformer_engine'"),
        ({"distributed_backend": "nccl"}, "the CPU host sets 'gloo'"),
        ({"fp8": "hybrid"}, "--fp8-format needs CUDA"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local needs CUDA"),
    ],
)
def test_flags_that_need_cuda_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        cpu_host.check_args(argparse.Namespace(**argument))


def test_enable_refuses_a_machine_with_cuda(monkeypatch):
    monkeypatch.setattr(cpu_host, "_adapt", lambda: None)
    cpu_host.enable()  # what a process did before does not count
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        cpu_host.enable()


def fail_on_the_last_rank() -> torch.Tensor:
    """The other ranks wait for the last one, which never comes."""
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 2:
        raise ValueError("no such luck")
    torch.distributed.barrier()


def add_up(start: float) -> torch.Tensor:
    torch.distributed.init_process_group("gloo")
    total = torch.full((2,), start + torch.distributed.get_rank())
    torch.distributed.all_reduce(total)
    return total


def test_harness_returns_tensors_by_rank():
    assert [result.tolist() for result in run_ranks(add_up, 3, 1.0)] == [[6.0, 6.0]] * 3


def test_harness_raises_the_first_failure_with_its_rank():
    with pytest.raises(ValueError, match="no such luck") as caught:
        run_ranks(fail_on_the_last_rank, 3)
    assert "raised on rank 2 of 3" in caught.value.__notes__[0]


def test_harness_says_where_ranks_hang():
    with pytest.raises(TimeoutError, match="rank0 of 1 ranks still ran") as caught:
        run_ranks(time.sleep, 1, 60, timeout=1)
    assert "_rank_main" in caught.value.__notes__[0]


def test_the_compiler_is_not_imported():
    """It took each process a second; what is decorated with it runs as written, imported or not."""
    code = """
import sys, torch
before = torch.compile(abs) if sys.argv[1:] else None
from megatron_cpo import install
install()
from megatron.core.fusions.fused_bias_swiglu import swiglu
assert ("torch._inductor.compile_fx" in sys.modules) == bool(before), sys.argv
@torch.compile(dynamic=True)
def twice(x):
    return 2 * x
print(float(twice(torch.tensor(2.0))), tuple(swiglu(torch.ones(1, 4)).shape))
"""
    for words in ([], ["first"]):
        done = run_python("-c", code, *words)
        assert done.stdout.splitlines()[-1:] == ["4.0 (1, 2)"], done.stderr
