"""ACR in the Hugging Face Trainer: override compute_loss().

Run it with `python`. It needs transformers and accelerate.
"""

import argparse
import importlib.util

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from acr_reg import AllPairsConsistencyLoss, HorizontalFlip, capture_attention


class ConsistentTrainer(Trainer):
    acr, criterion, attention = AllPairsConsistencyLoss(HorizontalFlip()), torch.nn.MultiLabelSoftMarginLoss(), None

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        images, labels = inputs["pixel_values"], inputs["labels"]
        outputs = model(images)
        loss = self.criterion(outputs.logits, labels)
        if model.training:
            attn_a = self.attention.take()
            loss = loss + self.criterion(model(self.acr.view(images)).logits, labels)
            consistency, terms = self.acr(attn_a, self.attention.take(), return_terms=True)
            self.log({"classes": loss.item(), **{name: term.item() for name, term in terms.items()}})
            loss = loss + consistency
        return (loss, outputs) if return_outputs else loss


def main(argv=None):
    parser = argparse.ArgumentParser()
    for name, default in {"steps": 8, "images": 32, "size": 64, "batch": 4, "accumulate": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", default="acr_run")
    args = parser.parse_args(argv)
    set_seed(0)
    # Your model, such as ViTForImageClassification.from_pretrained(...), and your data set of images and labels:
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    model = ViTForImageClassification(ViTConfig(image_size=args.size, num_labels=20, **sizes))
    data = [
        {"pixel_values": torch.rand(3, args.size, args.size), "labels": (torch.rand(20) < 0.1).float()}
        for _ in range(args.images)
    ]
    settings = TrainingArguments(
        args.folder,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        use_cpu=not torch.cuda.is_available(),
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        save_strategy="no",
        max_grad_norm=0,
    )
    trainer = ConsistentTrainer(model, settings, train_dataset=data, eval_dataset=data)
    trainer.model_accepts_loss_kwargs = False  # then the Trainer divides the loss by the accumulated steps
    trainer.attention = capture_attention(model)  # the model itself: the Trainer wraps it in DDP later
    trainer.train()
    trainer.attention.remove()
    print(trainer.evaluate())
    return model, trainer


if __name__ == "__main__":
    main()
