"""`--cpo-*` flags through Megatron's own parser: what they become, and every refusal."""

import argparse
from dataclasses import fields

import pytest

from harness.stores import null_tokenizer, write_store
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.objective import OBJECTIVES, PSS
from megatron_cpo.training.config import CPOConfig, add_cpo_args, cpo_config
from megatron_cpo.training.data import check_store
from megatron_cpo.training.support import _REFUSED, check_given, check_supported

CPO = ["--cpo-aux-loss", "--cpo-data-path", "data/groups", "--cpo-k", "12"]
SUPPORTED = CPO


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_cpo_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def knows(parser: argparse.ArgumentParser, argv: str) -> bool:
    """Whether this version of Megatron has the flags."""
    given = {word for word in argv.split() if word.startswith("--")}
    return given <= parser._option_string_actions.keys()


def test_without_a_flag_there_is_no_config(parser: argparse.ArgumentParser) -> None:
    assert cpo_config(parser.parse_args([])) is None


def test_defaults_are_the_papers(parser: argparse.ArgumentParser) -> None:
    """beta 5, K 12, best of K. The MLE term beside it is our own default, documented as such."""
    config = cpo_config(parser.parse_args(CPO))
    assert config == CPOConfig(data_path="data/groups")
    assert (config.beta, config.k, config.objective) == (5.0, 12, "best")
    assert (config.weight, config.mle_weight, config.fraction) == (1.0, 1.0, 1.0)


def test_candidates_are_the_stores_where_nobody_says(
    parser: argparse.ArgumentParser, tmp_path
) -> None:
    """And Megatron's arguments have them, which go into the log and into checkpoints."""
    store = write_store(tmp_path / "groups", 2, 7)
    args = parser.parse_args(["--cpo-aux-loss", "--cpo-data-path", store])
    config = cpo_config(args)
    assert config is not None and config.k == args.cpo_k == 7
    args = parser.parse_args(["--cpo-aux-loss", "--cpo-data-path", str(tmp_path / "no")])
    with pytest.raises(ValueError, match="no manifest there"):
        cpo_config(args)


def test_a_store_to_evaluate_on_has_the_same_k(tmp_path) -> None:
    train, valid = (write_store(tmp_path / str(k), 2, k) for k in (7, 4))
    config = CPOConfig(train, valid, k=7)
    check_store(GroupReader(train), config, null_tokenizer(), 64)
    message = r"--cpo-valid-data-path .*/4 has groups of K=4 candidates, .*/7 of K=7: evaluate on"
    with pytest.raises(ValueError, match=message):
        check_store(GroupReader(valid), config, null_tokenizer(), 64)


def test_another_k_than_the_stores_is_refused_with_what_helps(tmp_path) -> None:
    """--cpo-preset says one as well, which cannot be left out; build's --k makes no negatives."""
    store = write_store(tmp_path / "groups", 2, 4)
    message = r"^--cpo-k 12: .* of K=4 candidates; pass --cpo-k 4, or build .* --negatives that"
    for valid in (None, store):  # evaluated on itself
        with pytest.raises(ValueError, match=message):
            check_store(GroupReader(store), CPOConfig(store, valid), null_tokenizer(), 64)


GIVEN = {
    "data_path": "a",
    "valid_data_path": "b",
    "k": 3,
    "candidates": 2,
    "objective": "ranked",
    "dpop_lambda": 2.0,
    "length_normalise": True,
    "beta": 0.5,
    "weight": 2.0,
    "mle_weight": 0.5,
    "mle_average": "group",
    "mle_tokens": "sequence",
    "fraction": 0.25,
    "no_warmup": True,
    "preset": "paper",
    "grad_norm_interval": 5,
}


def flag(name: str) -> str:
    return f"--cpo-{name.replace('_', '-')}"


def words(name: str) -> list[str]:
    """A flag as it is given: a switch has no value."""
    value = GIVEN[name]
    return [flag(name)] if value is True else [flag(name), str(value)]


def test_every_flag_is_the_field_of_its_name(parser: argparse.ArgumentParser) -> None:
    assert list(GIVEN) == [field.name for field in fields(CPOConfig)]
    argv = [text for name in GIVEN for text in words(name)]
    whole = ["--cpo-mle-average", "token"]  # what a fraction needs
    parsed = parser.parse_args(["--cpo-aux-loss", *argv, *whole])
    assert cpo_config(parsed) == CPOConfig(**GIVEN | {"mle_average": "token"})
    assert parser.parse_args(words("mle_average")).cpo_mle_average == "group"
    ours = {a.option_strings[0] for a in parser._actions if a.dest.startswith("cpo_")}
    assert ours == {"--cpo-aux-loss", *map(flag, GIVEN)}


@pytest.mark.parametrize("name", GIVEN)
def test_a_flag_without_aux_loss_is_refused(parser: argparse.ArgumentParser, name: str) -> None:
    """It would have no effect, and nobody would notice."""
    args = parser.parse_args(words(name))
    with pytest.raises(
        ValueError, match=f"^{flag(name)} given without --cpo-aux-loss.*add --cpo-aux"
    ):
        cpo_config(args)


def test_plain_rows_that_count_for_nothing_are_refused(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args([*CPO, "--cpo-fraction", "0.5", "--cpo-mle-weight", "0"])
    with pytest.raises(ValueError, match=r"--cpo-fraction 0.5 with --cpo-mle-weight 0.*raise the"):
        cpo_config(args)


def test_all_flags_without_aux_loss_are_named(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(["--cpo-beta", "1", "--cpo-k", "3"])
    with pytest.raises(ValueError, match=r"^--cpo-k, --cpo-beta given without --cpo-aux-loss"):
        cpo_config(args)


def test_aux_loss_needs_data(parser: argparse.ArgumentParser) -> None:
    message = r"--cpo-aux-loss needs --cpo-data-path PREFIX.*megatron-cpo build"
    with pytest.raises(ValueError, match=message):
        cpo_config(parser.parse_args(["--cpo-aux-loss"]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cpo-k", "0"], r"--cpo-k 0: needs at least 1 candidate"),
        (["--cpo-beta", "0"], r"--cpo-beta 0\.0: needs a number above 0; the paper uses 5"),
        (["--cpo-beta", "-5"], r"--cpo-beta -5\.0: needs a number above 0"),
        (["--cpo-beta", "nan"], r"--cpo-beta nan: needs a number above 0"),
        (["--cpo-beta", "inf"], r"--cpo-beta inf: needs a number above 0"),
        (["--cpo-weight", "inf"], r"--cpo-weight inf: needs a number of at least 0"),
        (["--cpo-weight", "-1"], r"--cpo-weight -1\.0: needs a number of at least 0"),
        (["--cpo-weight", "nan"], r"--cpo-weight nan: needs a number of at least 0"),
        (["--cpo-mle-weight", "-0.5"], r"--cpo-mle-weight -0\.5: needs a number of at least 0"),
        (
            ["--cpo-weight", "0", "--cpo-mle-weight", "0"],
            r"--cpo-weight \+ --cpo-mle-weight 0\.0: needs one of the two above 0",
        ),
        (["--cpo-candidates", "1"], r"--cpo-candidates 1: needs 2 to --cpo-k 12 candidates"),
        (["--cpo-candidates", "13"], r"--cpo-candidates 13: needs 2 to --cpo-k 12 candidates"),
        (["--cpo-dpop-lambda", "-1"], r"--cpo-dpop-lambda -1\.0: needs a number of at least 0"),
        (
            ["--cpo-objective", "nce"],
            r"--cpo-objective nce with --cpo-beta 5\.0: needs 1: NCE's log-ratio",
        ),
        (
            ["--cpo-objective", "ranking-nce", "--cpo-beta", "1", "--cpo-dpop-lambda", "2"],
            r"--cpo-objective ranking-nce with --cpo-dpop-lambda 2\.0: needs its default",
        ),
        (
            ["--cpo-objective", "pss"],
            r"--cpo-objective pss with --cpo-mle-weight 1\.0: needs 0: the true continuation is",
        ),
        (
            ["--cpo-objective", "nce", "--cpo-beta", "1", "--cpo-length-normalise"],
            r"--cpo-objective nce with --cpo-length-normalise True: needs its default",
        ),
        (
            ["--cpo-fraction", "0.5", "--cpo-mle-average", "group"],
            r"--cpo-fraction 0\.5 with --cpo-mle-average group.*--cpo-mle-average token, or",
        ),
        (["--cpo-fraction", "0"], r"--cpo-fraction 0\.0: needs a share in \(0, 1\]"),
        (["--cpo-fraction", "1.01"], r"--cpo-fraction 1\.01: needs a share in \(0, 1\]"),
    ],
)
def test_values_out_of_range(
    parser: argparse.ArgumentParser, argv: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        cpo_config(parser.parse_args([*CPO, *argv]))


@pytest.mark.parametrize(
    "argv",
    [
        ["--cpo-k", "1"],
        ["--cpo-beta", "1e-3"],
        ["--cpo-weight", "0"],
        ["--cpo-mle-weight", "0"],
        ["--cpo-fraction", "1"],
        ["--cpo-fraction", "1e-3"],
    ],
)
def test_values_at_the_ends_of_their_range(
    parser: argparse.ArgumentParser, argv: list[str]
) -> None:
    assert cpo_config(parser.parse_args([*CPO, *argv])) is not None


@pytest.mark.parametrize("name", ["--cpo-objective", "--cpo-mle-tokens"])
def test_unknown_choices_are_refused_by_the_parser(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args([name, "nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_choices_are_the_objectives(parser: argparse.ArgumentParser) -> None:
    for objective in (*OBJECTIVES, PSS):
        argv = [*CPO, "--cpo-objective", objective, "--cpo-beta", "1", "--cpo-mle-weight", "0"]
        config = cpo_config(parser.parse_args(argv))
        assert config.objective == objective


REFUSED = [
    (
        "--hierarchical-context-parallel-sizes 2 2",
        r"--hierarchical-context-parallel-sizes or.*use --context-parallel-size alone",
    ),
    ("--dataloader-type cyclic", r"--dataloader-type other than single.*drop the flag"),
    ("--rampup-batch-size 2 2 100", r"--rampup-batch-size.*drop the flag"),
    ("--step-batch-size-schedule 0:8", r"--step-batch-size-schedule.*use --global-batch-size"),
    (
        "--hybrid-layer-pattern M*-",
        r"--hybrid-layer-pattern with layers other than \* - E.*use attention \*, MLP -",
    ),
    (
        "--hybrid-layer-pattern *-*E --pipeline-model-parallel-size 2",
        r"--hybrid-layer-pattern with a pipeline stage that has no.*give each stage an E",
    ),
    ("--mtp-num-layers 1", r"--mtp-num-layers.*drop the flag"),
    ("--multi-latent-attention", r"--multi-latent-attention.*ordinary and grouped-query attention"),
    (
        "--experimental-attention-variant gated_delta_net",
        r"--experimental-attention-variant.*drop the flag",
    ),
    ("--window-size 128,0", r"--window-size.*a tree counts depths"),
    ("--softmax-type off-by-one", r"--softmax-type other than vanilla.*no attention sink"),
    (
        "--position-embedding-type yarn",
        r"--position-embedding-type.*learned_absolute and rope; use",
    ),
    ("--use-mup", r"--use-mup.*does not scale logits"),
    ("--sft", r"--sft.*drop the flag"),
    ("--overlap-moe-expert-parallel-comm", r"--overlap-moe-expert-parallel-comm.*drop the flag"),
    ("--use-megatron-fsdp", r"Megatron or PyTorch FSDP.*use --use-distributed-optimizer"),
    ("--use-torch-fsdp2", r"Megatron or PyTorch FSDP.*use --use-distributed-optimizer"),
    (
        "--allow-ambiguous-pad-tokens --cpo-fraction 0.5",
        r"--allow-ambiguous-pad-tokens with --cpo-fraction < 1.*drop the flag",
    ),
    (
        "--eod-mask-loss --cpo-fraction 0.5",
        r"--eod-mask-loss with --cpo-fraction < 1.*drop one of them",
    ),
    ("--cuda-graph-impl local", r"CUDA graphs.*pass --cuda-graph-impl none"),
    ("--moe-expert-capacity-factor 1.0", r"--moe-expert-capacity-factor.*drop the flag"),
    ("--moe-expert-rank-capacity-factor 1.0", r"--moe-expert-capacity-factor or.*drop the flag"),
    ("--moe-use-upcycling", r"--moe-use-upcycling.*in a run of its own"),
    (
        "--dataloader-inter-document-masking --cpo-fraction 0.5",
        r"--dataloader-inter-document-masking or --fim-data with --cpo-fraction < 1.*drop the",
    ),
    ("--fim-data --cpo-fraction 0.5", r".*--fim-data with --cpo-fraction < 1.*drop the flag"),
    ("--logits-load-dir a", r"--logits-load-dir or --logits-save-dir.*drop the flag"),
    ("--logits-save-dir a", r"--logits-load-dir or --logits-save-dir.*drop the flag"),
    ("--perform-rl-step", r"--perform-rl-step.*drop one of the two"),
    (
        "--moe-router-load-balancing-type sinkhorn",
        r"--moe-router-load-balancing-type sinkhorn or.*use aux_loss or none",
    ),
    ("--moe-router-enable-expert-bias", r"--moe-router-enable-expert-bias.*use aux_loss"),
    ("--moe-input-jitter-eps 0.1", r"--moe-input-jitter-eps or.*drop the flag"),
    (
        "--tensor-parallel-num-weight-shards 2",
        r"--tensor-parallel-num-weight-shards other than.*drop the flag",
    ),
    ("--deterministic-mode", r"--deterministic-mode.*drop the flag"),
    ("--decrease-batch-size-if-needed", r"--decrease-batch-size-if-needed.*drop the flag"),
    ("--phase-transition-iterations 5", r"--phase-transition-iterations.*one by one"),
    ("--full-validation", r"--full-validation.*use --eval-iters"),
    (
        "--reset-position-ids --cpo-fraction 0.5",
        r"--reset-position-ids or --reset-attention-mask with --cpo-fraction < 1.*drop the flag",
    ),
    ("--check-for-spiky-loss", r"--check-for-spiky-loss.*drop the flag"),
    ("--qk-clip", r"--qk-clip or --log-max-attention-logit.*drop the flag"),
    ("--defer-embedding-wgrad-compute", r"--defer-embedding-wgrad-compute.*drop the flag"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[argv for argv, _ in REFUSED])
def test_what_cpo_cannot_honour_is_refused(
    parser: argparse.ArgumentParser, argv: str, message: str
) -> None:
    """One setting flipped on top of a supported run."""
    if not knows(parser, argv):
        pytest.skip("of another version")
    args = parser.parse_args([*SUPPORTED, *argv.split()])
    with pytest.raises(ValueError, match=f"^--cpo-aux-loss with {message}"):
        check_supported(args)


def test_what_megatron_asserts_without_a_word_is_asked_for(parser: argparse.ArgumentParser) -> None:
    """`assert args.micro_batch_size is not None` was all that a newcomer saw."""
    for flags, message in (
        ("", "^--micro-batch-size is not given: rows that a rank computes at a time; give 1, and"),
        ("--micro-batch-size 1 --save a --train-iters 30",
         "^--save a without --save-interval: Megatron needs it; --save-interval 30 saves once"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_given(parser.parse_args([*SUPPORTED, *flags.split()]))
    given = "--micro-batch-size 1 --save a --save-interval 5"
    check_given(parser.parse_args([*SUPPORTED, *given.split()]))


def test_every_refusal_has_a_case_of_its_own(parser: argparse.ArgumentParser) -> None:
    """Each case triggers exactly one row, and together they trigger all.

    A row may be of flags that the installed Megatron does not know, and so are its cases then."""
    triggered = set()
    known = [argv for argv, _ in REFUSED if knows(parser, argv)]
    for argv in known:
        args = parser.parse_args([*SUPPORTED, *argv.split()])
        settings = [setting for setting, is_set, _ in _REFUSED if is_set(args)]
        assert len(settings) == 1, argv
        triggered.add(settings[0])
    rows = {setting for setting, _, _ in _REFUSED}
    assert triggered == rows if len(known) == len(REFUSED) else triggered < rows


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--dataloader-type single",
        "--position-embedding-type rope --group-query-attention --num-query-groups 2",
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
        "--eod-mask-loss",  # no plain rows, so nothing is masked
        "--cpo-fraction 0.5",
        "--calculate-per-token-loss",
        "--context-parallel-size 2",
        "--num-experts 4 --moe-router-load-balancing-type aux_loss",
        "--hybrid-layer-pattern *-*E|*-",
        "--position-embedding-type none",
        "--hybrid-layer-pattern *E|*-|-|*E --pipeline-model-parallel-size 2",
        "--use-distributed-optimizer --recompute-granularity full",
    ],
)
def test_what_is_supported_passes(parser: argparse.ArgumentParser, argv: str) -> None:
    args = parser.parse_args([*SUPPORTED, *argv.split()])
    check_supported(args)
    assert cpo_config(args) is not None
