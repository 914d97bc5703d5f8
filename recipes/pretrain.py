"""Stage 1: pretrain by predicting masked items of users' histories.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain.py \\
        --config recipes/configs/movielens_t5-micro/pretrain.yaml --learning-rate 1e-3

Any file of accelerate_configs/ serves; flags override the YAML. Killed? The same command goes on from the last checkpoint.
"""

from genrec_llm.args import DataArguments, GenRecTrainingArguments, ModelArguments, parse_args
from genrec_llm.build import build_model
from genrec_llm.encoded import load_data
from genrec_llm.errors import exits_cleanly
from genrec_llm.processes import joined
from genrec_llm.runs import RunDirectory
from genrec_llm.tasks import MaskedItem
from genrec_llm.trainer import GenRecTrainer


@exits_cleanly
def main() -> None:
    data_args, model_args, training_args = parse_args(DataArguments, ModelArguments, GenRecTrainingArguments)

    # Data and vocabulary
    data = load_data(data_args, joined())
    run = RunDirectory("pretrain", data, data_args, model_args, training_args)

    # Model
    built = build_model(model_args, training_args, data)

    # Train
    task = MaskedItem(
        data.train,
        built.layout,
        seed=training_args.seed,
        masks_per_sequence=training_args.masks_per_sequence,
        last_item_probability=training_args.last_item_probability,
        user_dropout=training_args.user_dropout,
    )
    validation = data.held_out("validation", sample=training_args.validation_users)
    trainer = GenRecTrainer(built.model, training_args, task=task, layout=built.layout, validation=validation)
    run.train(trainer, built)
    trainer.finish()


if __name__ == "__main__":
    main()
