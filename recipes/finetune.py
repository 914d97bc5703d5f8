"""Stage 2: finetune on the next item, from a pretraining run or straight from the backbone.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/finetune.py \\
        --config recipes/configs/movielens_t5-micro/finetune.yaml --from-run runs/movielens_t5-micro/pretrain

Without --from-run it starts from the backbone (the ablation without pretraining).
"""

from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments, parse_args
from genrec_llm.build import build_model, inherit
from genrec_llm.encoded import load_data
from genrec_llm.errors import exits_cleanly
from genrec_llm.processes import joined
from genrec_llm.runs import RunDirectory
from genrec_llm.tasks import NextItem
from genrec_llm.trainer import GenRecTrainer


@exits_cleanly
def main() -> None:
    data_args, model_args, training_args = parse_args(DataArguments, ModelArguments, GenRecTrainingArguments)

    # Data and vocabulary
    data = load_data(data_args, joined())
    run = RunDirectory("finetune", data, data_args, model_args, training_args)

    # Model, with what pretraining taught it
    built = build_model(model_args, training_args, data)
    if training_args.from_run:
        inherit(built, data, training_args)

    # Train
    task = NextItem(
        data.train,
        built.layout,
        seed=training_args.seed,
        targets=training_args.targets,
        user_dropout=training_args.user_dropout,
    )
    validation = data.held_out("validation", sample=training_args.validation_users)
    trainer = GenRecTrainer(built.model, training_args, task=task, layout=built.layout, validation=validation)
    run.train(trainer, built)
    trainer.finish()


if __name__ == "__main__":
    main()
