"""ACR with Hugging Face Accelerate: prepare the model, then capture it.

Run it with `python` or with `accelerate launch`. It needs accelerate, timm and tqdm.
"""

import argparse
import importlib.util

import timm
import torch
from accelerate import Accelerator
from tqdm import tqdm

from acr_reg import AllPairsConsistencyLoss, HorizontalFlip, capture_attention


def main(argv=None):
    parser = argparse.ArgumentParser()
    for name, default in {"epochs": 2, "images": 32, "size": 64, "batch": 4, "accumulate": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", default="acr_run")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=args.precision,
        gradient_accumulation_steps=args.accumulate,
        log_with="tensorboard" if importlib.util.find_spec("tensorboard") else None,
        project_dir=args.folder,
    )
    accelerator.init_trackers("acr")
    model = timm.create_model("vit_tiny_patch16_224", img_size=args.size, num_classes=20)  # your model
    # Your data set of images and multi-hot labels:
    images, labels = torch.rand(args.images, 3, args.size, args.size), (torch.rand(args.images, 20) < 0.1).float()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), args.batch)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4), loader)
    attention = capture_attention(model)  # after prepare(), which may wrap the model in DDP
    acr, criterion = AllPairsConsistencyLoss(HorizontalFlip()), torch.nn.MultiLabelSoftMarginLoss()
    history = []
    for epoch in range(args.epochs):
        bar = tqdm(loader, f"epoch {epoch}", disable=not accelerator.is_main_process)
        for images, labels in bar:
            with accelerator.accumulate(model):
                loss, attn_a = criterion(model(images), labels), attention.take()
                loss, attn_b = loss + criterion(model(acr.view(images)), labels), attention.take()
                consistency, terms = acr(attn_a, attn_b, return_terms=True)
                accelerator.backward(loss + consistency)
                optimizer.step()
                optimizer.zero_grad()
            del attn_a, attn_b  # they hold the graph
            history.append({"classes": loss.item(), **{name: term.item() for name, term in terms.items()}})
            bar.set_postfix(history[-1])
            accelerator.log(history[-1], step=len(history))
        accelerator.print(f"epoch {epoch}: {history[-1]}")
    accelerator.end_training()
    attention.remove()
    return accelerator.unwrap_model(model), history


if __name__ == "__main__":
    main()
