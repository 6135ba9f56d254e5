"""ACR in PyTorch Lightning: capture in on_fit_start, take after each forward.

Run it with `python`. It needs pytorch-lightning and timm.
"""

import argparse
import importlib.util

import pytorch_lightning as pl
import timm
import torch

from acr_reg import AllPairsConsistencyLoss, HorizontalFlip, capture_attention


class ConsistentViT(pl.LightningModule):
    def __init__(self, size):
        super().__init__()
        self.model = timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=20)  # your model
        self.acr = AllPairsConsistencyLoss(HorizontalFlip())
        self.criterion = torch.nn.MultiLabelSoftMarginLoss()

    def on_fit_start(self):  # the model is on its device, and Lightning wraps the module around it in DDP
        self.attention = capture_attention(self.model)

    def training_step(self, batch, _):
        images, labels = batch
        loss, attn_a = self.criterion(self.model(images), labels), self.attention.take()
        loss, attn_b = loss + self.criterion(self.model(self.acr.view(images)), labels), self.attention.take()
        consistency, terms = self.acr(attn_a, attn_b, return_terms=True)
        self.log_dict({"classes": loss, **terms}, prog_bar=True)
        return loss + consistency

    def validation_step(self, batch, _):  # Lightning turns gradients off, so the capture records nothing
        images, labels = batch
        self.log("val_classes", self.criterion(self.model(images), labels), prog_bar=True)

    def on_fit_end(self):
        self.attention.remove()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main(argv=None):
    parser = argparse.ArgumentParser()
    for name, default in {"steps": 8, "images": 32, "size": 64, "batch": 4, "accumulate": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", default="acr_run")
    args = parser.parse_args(argv)
    pl.seed_everything(0, verbose=False)
    module = ConsistentViT(args.size)
    # Your data set of images and multi-hot labels:
    images, labels = torch.rand(args.images, 3, args.size, args.size), (torch.rand(args.images, 20) < 0.1).float()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), args.batch)
    logger = pl.loggers.TensorBoardLogger if importlib.util.find_spec("tensorboard") else pl.loggers.CSVLogger
    trainer = pl.Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        max_steps=args.steps,
        max_epochs=-1,
        accumulate_grad_batches=args.accumulate,
        logger=logger(args.folder),
        log_every_n_steps=1,
        default_root_dir=args.folder,
    )
    trainer.fit(module, loader, loader)
    print({name: value.item() for name, value in trainer.logged_metrics.items()})
    return module.model, trainer


if __name__ == "__main__":
    main()
