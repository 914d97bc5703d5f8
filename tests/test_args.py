"""Command lines and YAML files, and what is refused in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from genrec_llm.args import (
    DataArguments,
    EvaluateArguments,
    GenRecTrainingArguments,
    MergeArguments,
    ModelArguments,
    parse_args,
)
from genrec_llm.errors import ConfigError

YAML = """\
# accelerate launch recipes/finetune.py --config this.yaml
# Override anything behind it: --max_history 20

dataset: log.csv  # a file of one's own
max_history: 30
drop_duplicates: true

backbone: folder
lora_target_modules: [q, v]
tie_item_rows: false
dropout: 0.25
"""


def parsed(tmp_path: Path, yaml: str, *flags: str, classes: Any = (DataArguments, ModelArguments)) -> tuple[Any, ...]:
    path = tmp_path / "run.yaml"
    path.write_text(yaml)
    return parse_args(*classes, argv=["--config", str(path), *flags])


def problems(tmp_path: Path, yaml: str, *flags: str, classes: Any = (DataArguments, ModelArguments)) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parsed(tmp_path, yaml, *flags, classes=classes)
    return caught.value.problems


def test_a_loss_that_is_averaged_on_each_device_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"average_tokens_across_devices: .* leave it true"):
        GenRecTrainingArguments(output_dir=str(tmp_path), average_tokens_across_devices=False)


# --- YAML and overrides -------------------------------------------------------


def test_a_yaml_file_with_comments_sets_every_kind_of_value(tmp_path: Path) -> None:
    data, model = parsed(tmp_path, YAML)
    assert (data.dataset, data.max_history, data.drop_duplicates) == ("log.csv", 30, True)
    assert (model.backbone, model.lora_target_modules, model.tie_item_rows) == ("folder", ["q", "v"], False)
    assert model.dropout == 0.25
    assert (data.k_core, model.lora_r) == (0, 16)  # what the file does not name keeps its default


def test_the_command_line_overrides_the_file_wherever_it_stands(tmp_path: Path) -> None:
    flags = [
        "--max_history",
        "20",
        "--lora-target-modules",
        "k",
        "--drop_duplicates",
        "false",
        "--tie_item_rows",
    ]
    data, model = parsed(tmp_path, YAML, *flags)
    assert (data.max_history, data.drop_duplicates) == (20, False)
    assert (model.lora_target_modules, model.tie_item_rows) == (["k"], True)
    path = tmp_path / "run.yaml"
    (data,) = parse_args(DataArguments, argv=["--max_history", "20", "--config", str(only_data(path)), "--k_core", "5"])
    assert (data.max_history, data.k_core) == (20, 5)


def only_data(path: Path) -> Path:
    path.write_text("dataset: log.csv\nmax_history: 30\n")
    return path


def test_the_file_counts_however_its_flag_is_written(tmp_path: Path) -> None:
    path = only_data(tmp_path / "run.yaml")
    (data,) = parse_args(DataArguments, argv=[f"--config={path}", "--dataset", "other.csv"])
    assert (data.dataset, data.max_history) == ("other.csv", 30)


def test_a_shortened_flag_for_the_file_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    path = only_data(tmp_path / "run.yaml")
    try:
        (data,) = parse_args(DataArguments, argv=["--conf", str(path), "--dataset", "other.csv"])
    except ConfigError:
        return
    assert data.max_history == 30


def test_null_in_the_file_takes_a_default_away(tmp_path: Path) -> None:
    yaml = f"output_dir: {tmp_path}\nsave_total_limit: null\n"
    (training,) = parsed(tmp_path, yaml, classes=(GenRecTrainingArguments,))
    assert training.save_total_limit is None


def test_an_unquoted_no_is_the_word_no_where_a_word_is_asked_for(tmp_path: Path) -> None:
    yaml = f"output_dir: {tmp_path}\neval_strategy: no\nsave_strategy: no\nload_best_model_at_end: no\n"
    (training,) = parsed(tmp_path, yaml, classes=(GenRecTrainingArguments,))
    assert (training.eval_strategy, training.save_strategy, training.load_best_model_at_end) == (
        "no",
        "no",
        False,
    )


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    yaml = f"output_dir: {tmp_path}\nlearning_rate: 3e-4\nrows_learning_rate: 1.e-2\nwarmup_steps: 0.1\n"
    (training,) = parsed(tmp_path, yaml, classes=(GenRecTrainingArguments,))
    assert (training.learning_rate, training.rows_rate, training.warmup_steps) == (3e-4, 1e-2, 0.1)


# --- what is refused ----------------------------------------------------------


def test_unknown_keys_are_refused_all_at_once_each_with_the_nearest_name(tmp_path: Path) -> None:
    found = problems(tmp_path, "dataset: x\nmax_histroy: 3\nlora_rank: 4\nqqqqqqqq: 1\n")
    assert len(found) == 3
    assert "'max_histroy': did you mean max_history?" in found[0]
    assert "'lora_rank': did you mean lora_r" in found[1]
    assert "'qqqqqqqq'" in found[2] and "--help" in found[2]
    assert all(problem.startswith(str(tmp_path / "run.yaml")) for problem in found)


def test_a_key_of_another_recipe_is_unknown(tmp_path: Path) -> None:
    assert "'max_history'" in problems(tmp_path, "run: r\nmax_history: 3\n", classes=(EvaluateArguments,))[0]


def test_unknown_flags_are_refused_all_at_once_each_with_the_nearest_name(tmp_path: Path) -> None:
    found = problems(tmp_path, "dataset: x\n", "--max-historys", "3", "--lora_dropouts=0.1")
    assert found == [
        "--max-historys: unknown flag: did you mean --max-history?",
        "--lora_dropouts=0.1: unknown flag: did you mean --lora-dropout?",
    ]
    assert "stray" in problems(tmp_path, "dataset: x\n", "stray")[0]


def test_all_faults_of_a_group_are_told_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, "dataset: x\nusers: hashed\nmax_history: 0\n")
    assert [problem.split(":")[0] for problem in found] == ["user_buckets", "max_history"]
    found = problems(
        tmp_path,
        "dataset: x\ntuning: some\nrow_init: best\nbackbone_init: none\ndecoder_prompt: last\nlast_items_share: 1\n",
    )
    assert [problem.split(":")[0] for problem in found] == [
        "backbone_init",
        "tuning",
        "row_init",
        "decoder_prompt",
        "last_items_share",
    ]
    assert "is not one of lora, full" in found[1]


def test_reentrant_checkpointing_is_refused_where_it_would_lose_a_gradient(tmp_path: Path) -> None:
    yaml = f"output_dir: {tmp_path}\ngradient_checkpointing: true\ngradient_checkpointing_kwargs: {{use_reentrant: true}}\n"
    (found,) = problems(tmp_path, yaml, classes=(GenRecTrainingArguments,))
    assert found.startswith("gradient_checkpointing_kwargs:") and "--packing false" in found
    for mended in (yaml.replace("use_reentrant: true", "use_reentrant: false"), yaml + "kernels: false\n"):
        parsed(tmp_path, mended, classes=(GenRecTrainingArguments,))
    (silent,) = parsed(
        tmp_path, yaml.replace("use_reentrant", "preserve_rng_state"), classes=(GenRecTrainingArguments,)
    )
    assert silent.gradient_checkpointing_kwargs == {"preserve_rng_state": True, "use_reentrant": False}


def test_rates_below_nought_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        GenRecTrainingArguments(output_dir=str(tmp_path), learning_rate=-1.0, rows_learning_rate=float("nan"))
    told = ("learning_rate: -1.0 is not a number of", "rows_learning_rate: nan is not a number of")
    assert [problem.startswith(start) for problem, start in zip(refused.value.problems, told, strict=True)] == [
        True
    ] * 2


def test_fp16_is_refused_with_the_reason_and_the_mend(tmp_path: Path) -> None:
    yaml = f"output_dir: {tmp_path}\nfp16: true\ntargets: most\n"
    targets, fp16 = problems(tmp_path, yaml, classes=(GenRecTrainingArguments,))
    assert targets.startswith("targets: 'most' is not one of all, last")
    assert fp16.startswith("fp16:") and "overflows" in fp16 and "23918" in fp16 and "--bf16" in fp16


def test_adapters_on_random_weights_are_refused_with_the_mend(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "dataset: x\nbackbone: t5-micro\nbackbone_init: random\n")
    assert problem.startswith("tuning:") and "--tuning full" in problem
    _, model = parsed(tmp_path, "dataset: x\nbackbone: t5-micro\nbackbone_init: random\ntuning: full\n")
    assert model.tuning == "full"


@pytest.mark.parametrize("yaml", ["", "- a\n- b\n", "just text\n", "dataset: [x\n", "1: 2\ndataset: x\n"])
def test_a_file_that_is_no_mapping_of_names_is_refused_with_its_name(yaml: str, tmp_path: Path) -> None:
    assert str(tmp_path / "run.yaml") in problems(tmp_path, yaml)[0]


def test_a_file_that_is_not_utf8_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"dataset: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        parse_args(DataArguments, argv=["--config", str(tmp_path / "run.yaml")])


def test_an_absent_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such configuration file"):
        parse_args(DataArguments, argv=["--config", str(tmp_path / "absent.yaml")])
    with pytest.raises(ConfigError, match="--config"):
        parse_args(DataArguments, argv=["--dataset", "x", "--config"])


def test_the_choices_of_merging_and_evaluating_are_checked() -> None:
    with pytest.raises(ConfigError, match="dtype: 'float16' is not one of float32, bfloat16"):
        parse_args(MergeArguments, argv=["--run", "r", "--dtype", "float16"])
    with pytest.raises(ConfigError, match="split: 'train' is not one of validation, test"):
        parse_args(EvaluateArguments, argv=["--run", "r", "--split", "train"])
    with pytest.raises(ConfigError, match="batch_size: 0 is not at least 1"):
        parse_args(EvaluateArguments, argv=["--run", "r", "--batch-size", "0"])


# --- training arguments -------------------------------------------------------


def test_the_global_batch_is_what_the_trainer_is_told_about(tmp_path: Path) -> None:
    yaml = f"output_dir: {tmp_path}\nglobal_batch_size: 10\ngradient_accumulation_steps: 4\n"
    (training,) = parsed(tmp_path, yaml, classes=(GenRecTrainingArguments,))
    assert training.per_device_train_batch_size == 3  # a quarter of ten, rounded up
    assert training.rows_rate == training.learning_rate == 1e-3


def test_a_global_batch_smaller_than_its_shares_is_refused(tmp_path: Path) -> None:
    yaml = f"output_dir: {tmp_path}\nglobal_batch_size: 3\ngradient_accumulation_steps: 4\n"
    (problem,) = problems(tmp_path, yaml, classes=(GenRecTrainingArguments,))
    assert problem.startswith("global_batch_size: 3 examples") and "4 accumulation steps" in problem
