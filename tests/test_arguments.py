"""What a checkpoint says of its model against a run's flags: on meaning, from every source."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpo.checkpoints.arguments import (
    check_model,
    run_differences,
    said_of,
    vocabulary_range,
)
from megatron_cpo.checkpoints.conversion.convert import convert
from megatron_cpo.checkpoints.formats.new_torch_dist import NewTorchDist
from megatron_cpo.checkpoints.formats.saved import saved_arguments
from megatron_cpo.host.compat import parsed_flags
from megatron_cpo.scoring.under_megatron import MODEL_FLAGS
from tests.checkpoints import Trap
from tests.tiny_models import save_hugging_face

GPT = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64 "
LLAMA = GPT + (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--ffn-hidden-size 64 --untie-embeddings-and-output-weights "
)
EXPERTS = GPT + "--num-experts 4 --moe-router-topk 2 "


@pytest.mark.parametrize(
    ("model", "change", "name"),
    [
        (GPT, "--num-layers 4", "num_layers"),
        (GPT, "--hidden-size 64 --kv-channels 8", "hidden_size"),
        (GPT, "--num-attention-heads 2 --kv-channels 8", "num_attention_heads num_query_groups"),
        (GPT, "--kv-channels 16", "kv_channels"),
        (GPT, "--group-query-attention --num-query-groups 2", "num_query_groups"),
        (GPT + "--ffn-hidden-size 64", "--ffn-hidden-size 128", "ffn_hidden_size"),
        (GPT, "--max-position-embeddings 128", "max_position_embeddings"),
        (GPT, "--position-embedding-type rope", "position_embedding_type"),
        (GPT, "--position-embedding-type none", "position_embedding_type"),
        (GPT, "--norm-epsilon 1e-2", "layernorm_epsilon"),
        (GPT, "--apply-layernorm-1p", "layernorm_zero_centered_gamma"),
        (GPT, "--normalization RMSNorm", "normalization"),
        (GPT, "--no-bias-gelu-fusion", "bias_gelu_fusion"),
        (GPT, "--swiglu", "swiglu"),
        (GPT, "--squared-relu", "squared_relu"),
        (GPT, "--quick-geglu", "quick_geglu"),
        (GPT, "--disable-bias-linear", "add_bias_linear add_qkv_bias bias_gelu_fusion"),
        (GPT, "--untie-embeddings-and-output-weights", "untie_embeddings_and_output_weights"),
        (GPT, "--qk-layernorm", "qk_layernorm"),
        (GPT, "--qk-l2-norm", "qk_l2_norm"),
        (GPT, "--window-size 16,0", "window_size"),
        (GPT, "--softmax-type learnable", "softmax_type"),
        (GPT, "--attention-output-gate", "attention_output_gate"),
        (GPT, "--use-mup", "use_mup"),
        (GPT, "--multi-latent-attention", "multi_latent_attention"),
        (
            GPT,
            "--apply-residual-connection-post-layernorm",
            "apply_residual_connection_post_layernorm",
        ),
        (GPT, "--num-experts 4", "num_experts"),
        (LLAMA, "--add-qkv-bias", "add_qkv_bias"),
        (LLAMA, "--rotary-base 500000", "rotary_base"),
        (LLAMA, "--rotary-percent 0.5", "rotary_percent"),
        (LLAMA, "--rotary-interleaved", "rotary_interleaved"),
        (LLAMA, "--rotary-seq-len-interpolation-factor 2", "rotary_seq_len_interpolation_factor"),
        (LLAMA, "--use-rope-scaling", "use_rope_scaling"),
        (LLAMA, "--no-rope-freq 2", "no_rope_freq"),
        (LLAMA, "--glu-linear-offset 1.0", "glu_linear_offset"),
        (LLAMA, "--activation-func-clamp-value 7.0", "activation_func_clamp_value"),
        (EXPERTS, "--moe-router-topk 1", "moe_router_topk"),
        (EXPERTS, "--moe-router-score-function sigmoid", "moe_router_score_function"),
        (EXPERTS, "--moe-router-pre-softmax", "moe_router_pre_softmax"),
        (EXPERTS, "--moe-router-topk-scaling-factor 2.5", "moe_router_topk_scaling_factor"),
        (EXPERTS, "--moe-layer-freq 2", "moe_layer_freq"),
        (EXPERTS + "--moe-ffn-hidden-size 32", "--moe-ffn-hidden-size 64", "moe_ffn_hidden_size"),
        (
            EXPERTS,
            "--moe-shared-expert-intermediate-size 64",
            "moe_shared_expert_intermediate_size",
        ),
        (EXPERTS, "--moe-router-num-groups 2", "moe_router_num_groups"),
        (
            GPT + "--hybrid-layer-pattern *-*-",
            "--hybrid-layer-pattern *-*E",
            "hybrid_layer_pattern",
        ),
        (GPT, "--hybrid-layer-pattern *-*-*-", "hybrid_layer_pattern"),
    ],
)
def test_another_model_is_found(model: str, change: str, name: str) -> None:
    """Either way round, and nothing else is."""
    there, here = (parsed_flags(flags.split()) for flags in (model, f"{model} {change}"))
    found = run_differences(said_of(there), here)
    assert {difference.name for difference in found} == set(name.split())
    back = run_differences(said_of(here), there)
    assert {(d.name, str(d.ours), str(d.theirs)) for d in back} == {
        (d.name, str(d.theirs), str(d.ours)) for d in found
    }


@pytest.mark.parametrize(
    ("model", "same"),
    [
        (GPT, "--kv-channels 8"),
        (GPT, "--group-query-attention --num-query-groups 4"),
        (GPT, "--position-embedding-type learned_absolute --norm-epsilon 0.00001"),
        (GPT, "--openai-gelu"),  # parsed and never read
        (GPT, "--rotary-base 500000 --rotary-percent 0.5 --use-rope-scaling"),  # no RoPE
        (GPT, "--hybrid-layer-pattern *-*-"),  # loads a GPT's layers
        (GPT + "--hybrid-layer-pattern *-*-", "--hybrid-layer-pattern *-|*-"),
        (GPT, "--moe-router-topk 1 --moe-layer-freq 2"),  # no experts
        (LLAMA, "--use-rotary-position-embeddings --max-position-embeddings 4096"),
        (LLAMA, "--rotary-seq-len-interpolation-factor 1 --rope-scaling-factor 32"),
        (LLAMA, "--no-bias-gelu-fusion --no-bias-swiglu-fusion"),
        (EXPERTS, "--moe-layer-freq [1,1] --ffn-hidden-size 64 --moe-ffn-hidden-size 128"),
        (LLAMA + "--no-rope-freq 2", "--no-rope-freq [0,1]"),
        (LLAMA + "--use-rope-scaling", "--rope-scaling-factor 32"),  # is never passed on
        *((GPT, each) for each in (
            "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2",
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
            "--seq-length 512 --micro-batch-size 4 --global-batch-size 8 --lr 1e-3 --seed 3",
            "--hidden-dropout 0 --attention-dropout 0 --bf16 --attention-softmax-in-fp32",
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            "--no-masked-softmax-fusion --no-rope-fusion --no-bias-dropout-fusion",
            "--transformer-impl local --make-vocab-size-divisible-by 64 --init-method-std 0.3",
            "--mtp-num-layers 1 --moe-aux-loss-coeff 0.1 --fp8-format hybrid",
            "--apply-query-key-layer-scaling --use-distributed-optimizer --num-workers 0",
        )),
    ],
)  # fmt: skip
def test_another_spelling_or_layout_is_the_same_model(model: str, same: str) -> None:
    there, here = (parsed_flags(flags.split()) for flags in (model, f"{model} {same}"))
    here["moe_ffn_hidden_size"] = here["moe_ffn_hidden_size"] or there["moe_ffn_hidden_size"]
    assert run_differences(said_of(there), here) == []


def test_a_manifest_says_a_part() -> None:
    """What a store keeps of the run that scored it: no number of layers, and groups of no heads."""
    flags = (LLAMA + "--no-rope-freq 2 --group-query-attention --num-query-groups 2").split()
    here = parsed_flags(flags)
    known = {name: here[name] for name in MODEL_FLAGS if name in here}
    assert run_differences(said_of(known), here) == []
    found = run_differences(said_of({**known, "rotary_base": 5}), here)
    assert [difference.name for difference in found] == ["rotary_base"]


def test_names_of_older_versions_are_known() -> None:
    """Megatron up to 0.16; what it did not know yet is no difference."""
    there = {"norm_epsilon": 1e-6, "apply_layernorm_1p": True, "hybrid_override_pattern": None}
    found = run_differences(said_of(there), parsed_flags(GPT.split()))
    assert [d.name for d in found] == ["layernorm_epsilon", "layernorm_zero_centered_gamma"]
    assert run_differences({}, parsed_flags(GPT.split())) == []


def test_a_value_that_cannot_be_read_is_no_difference() -> None:
    here = parsed_flags(GPT.split())
    there = {"normalization": object(), "hidden_size": None}
    assert run_differences(said_of(there), here) == []


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, None),
        ({"padded_vocab_size": 512, "make_vocab_size_divisible_by": 128}, (385, 512)),
        (
            {
                "padded_vocab_size": 512,
                "make_vocab_size_divisible_by": 128,
                "tensor_model_parallel_size": 2,
                "tokenizer_type": "SentencePieceTokenizer",
                "tokenizer_model": "a",
                "vocab_size": 400,
            },
            (257, 512),
        ),
        (
            {
                "padded_vocab_size": 512,
                "make_vocab_size_divisible_by": 128,
                "tokenizer_type": "NullTokenizer",
                "vocab_size": 500,
            },
            (500, 500),
        ),
    ],
)
def test_how_many_tokens_a_vocabulary_may_have(args: dict, expected: Any) -> None:
    assert vocabulary_range(args) == expected


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama from Hugging Face as a Megatron checkpoint, 100 tokens."""
    folder = tmp_path_factory.mktemp("converted")
    hugging_face = save_hugging_face(folder / "hf")
    return convert(hugging_face, folder / "m", from_format="hf", to_format="megatron")


def run_of(folder: Path, change: str = "", **more: Any) -> argparse.Namespace:
    """Arguments of a run with the printed flags and a change, as if validated."""
    words = (folder / "megatron_flags.txt").read_text().split() + change.split()
    options = {"load": str(folder), **more}
    return argparse.Namespace(**{**parsed_flags(words), **options})


def test_a_converted_checkpoint_runs_with_its_own_flags(converted: Path) -> None:
    check_model(run_of(converted), 100)


def refusal(run: argparse.Namespace, tokens: int = 100) -> str:
    with pytest.raises(ValueError, match=r"^--\S+ \S+: ") as error:
        check_model(run, tokens)
    return str(error.value)


def test_all_that_differs_is_named_with_what_to_do(converted: Path) -> None:
    message = refusal(
        run_of(
            converted,
            "--norm-epsilon 0.5 --rotary-base 7 --normalization LayerNorm",
            swiglu=False,
            add_bias_linear=True,
            num_query_groups=4,
        )
    )
    assert "by the arguments saved in it its model is another one than this run's: " in message
    for part in (
        "layernorm_epsilon is 1e-06 there and 0.5 here: pass --norm-epsilon 1e-06",
        "rotary_base is 10000 there and 7 here: pass --rotary-base 10000",
        "normalization is 'RMSNorm' there and 'LayerNorm' here: pass --normalization RMSNorm",
        "swiglu is True there and False here: pass --swiglu",
        "add_bias_linear is False there and True here: pass --disable-bias-linear",
        "is 2 there and 4 here: pass --group-query-attention --num-query-groups 2",
    ):
        assert part in message


def test_what_the_arguments_leave_out_the_flags_beside_them_say(converted: Path) -> None:
    """The converter names only what tells families apart; its flags leave the rest at defaults."""
    message = refusal(run_of(converted, "--qk-layernorm --rotary-interleaved"))
    assert "by megatron_flags.txt its model" in message
    assert "qk_layernorm is False there and True here: drop --qk-layernorm" in message
    assert "rotary_interleaved is False there and True here: drop --rotary-int" in message


def test_a_configuration_beside_it_that_differs_is_named(converted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(converted, tmp_path / "m")
    path = folder / "hugging_face" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    message = refusal(run_of(folder))
    assert "by hugging_face/config.json its model" in message
    assert "layernorm_epsilon is 0.1 there and 1e-06 here" in message
    path.write_text('{"model_type": "of no family"}')
    check_model(run_of(folder), 100)


def test_what_was_trained_in_the_same_folder_speaks_for_itself(
    converted: Path, tmp_path: Path
) -> None:
    """Flags and configuration beside it are those of the release."""
    folder = shutil.copytree(converted, tmp_path / "m")
    (folder / "release").rename(folder / "iter_0000005")
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    check_model(run_of(folder, "--qk-layernorm"), 100)
    (folder / "latest_checkpointed_iteration.txt").unlink()
    message = refusal(run_of(folder, "--norm-epsilon 0.5", ckpt_step=5))  # needs no tracker
    assert "layernorm_epsilon" in message


def test_use_checkpoint_args_is_told_that_it_is_not_enough(converted: Path) -> None:
    message = refusal(run_of(converted, "--use-checkpoint-args --norm-epsilon 1e-5"))
    assert "(--use-checkpoint-args does not restore all arguments): layernorm_eps" in message


def test_a_pretrained_checkpoint_is_the_one_that_is_loaded(converted: Path, tmp_path: Path) -> None:
    run = run_of(converted, "--norm-epsilon 0.5", load=None, pretrained_checkpoint=str(converted))
    assert refusal(run).startswith("--pretrained-checkpoint ")
    run.load = str(tmp_path / "not_yet")
    assert refusal(run).startswith("--pretrained-checkpoint ")
    (tmp_path / "not_yet").mkdir()  # the run was resumed, and is what is loaded
    shutil.copytree(converted / "release", tmp_path / "not_yet" / "iter_0000002")
    (tmp_path / "not_yet" / "latest_checkpointed_iteration.txt").write_text("2")
    assert refusal(run).startswith("--load ")


def test_a_vocabulary_of_another_size_is_refused(converted: Path) -> None:
    message = refusal(run_of(converted), 101)
    assert "its vocabulary has 100 tokens, this run's tokenizer 101; use the model's own" in message


def test_rows_that_a_flag_padded_say_nothing_of_the_tokens(converted: Path, tmp_path: Path) -> None:
    """As of a model that was made elsewhere: 151,669 tokens in 151,936 rows, in steps of 128."""
    folder = tmp_path / "m"
    folder.mkdir()
    new = NewTorchDist(folder, 1e9)
    known = {"padded_vocab_size": 151_936, "make_vocab_size_divisible_by": 128}
    new.add_states(known, 1)
    new.complete()
    check_model(run_of(converted, load=str(folder), padded_vocab_size=151_936), 151_669)
    for rows, tokens in ((151_680, 151_669), (152_064, 151_937)):
        run = run_of(converted, load=str(folder), padded_vocab_size=rows)
        with pytest.raises(ValueError, match=rf"151936 tokens, 127 of .* tokenizer {tokens}; use"):
            check_model(run, tokens)


def test_arguments_of_a_checkpoint_of_torch_save(tmp_path: Path) -> None:
    """--ckpt-format torch; nothing in it is run."""
    folder = tmp_path / "iter_0000005" / "mp_rank_00"
    folder.mkdir(parents=True)
    state = {
        "args": argparse.Namespace(layernorm_epsilon=1e-5, dtype=torch.bfloat16),
        "model": {"weight": torch.nn.Parameter(torch.ones(3))},
        "trap": Trap(tmp_path / "sprung"),
    }
    torch.save(state, folder / "model_optim_rng.pt")
    assert saved_arguments(folder.parent)["layernorm_epsilon"] == 1e-5
    assert not (tmp_path / "sprung").exists()
    (folder / "model_optim_rng.pt").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match=r"model_optim_rng\.pt cannot be read .*copy it again"):
        saved_arguments(folder.parent)


def test_a_format_that_only_megatron_reads_says_nothing(tmp_path: Path) -> None:
    assert saved_arguments(tmp_path) == {}
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}')
    assert saved_arguments(tmp_path) == {}
