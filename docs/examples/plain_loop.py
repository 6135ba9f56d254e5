"""A plain PyTorch loop with ACR: mixed precision, accumulation, checkpointing, EMA, DDP and resuming.

Run it with `python`, or with `torchrun --nproc-per-node 2`. It needs torch 2.3, timm and tqdm."""

import argparse
import importlib.util
import os

import timm
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm

from acr_reg import AllPairsConsistencyLoss, HorizontalFlip, capture_attention


def main(argv=None):
    cuda, rank, world = torch.cuda.is_available(), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    parser = argparse.ArgumentParser()
    for name, default in {"epochs": 2, "images": 32, "size": 64, "batch": 4, "accumulate": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", default="acr_run")
    parser.add_argument("--amp", choices=["float32", "bfloat16", "float16"], default="float16" if cuda else "bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint FOLDER.pt")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    # Your model, such as one with pretrained=True, and your data set of images and multi-hot labels:
    plain = model = timm.create_model("vit_tiny_patch16_224", img_size=args.size, num_classes=20).to(device)
    data = TensorDataset(torch.rand(args.images, 3, args.size, args.size), torch.rand(args.images, 20).lt(0.1).float())
    plain.set_grad_checkpointing()  # timm's checkpointing is non-reentrant, which a capture needs
    ema = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.999))  # a copy, made before the capture
    if world > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
        model = torch.nn.parallel.DistributedDataParallel(plain, device_ids=[device.index] if cuda else None)
    attention = capture_attention(model)  # after DDP, and without torch.compile
    acr, criterion = AllPairsConsistencyLoss(HorizontalFlip()), torch.nn.MultiLabelSoftMarginLoss()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "float16")
    parts, path, first, history, writer = [plain, ema, optimizer, scaler], f"{args.folder}.pt", 0, [], None
    if args.resume:
        first, states = torch.load(path, map_location=device, weights_only=True)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    if rank == 0 and importlib.util.find_spec("tensorboard"):
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(args.folder)
    loader = DataLoader(data, args.batch, sampler=DistributedSampler(data, world, rank, drop_last=True), drop_last=True)
    for epoch in range(first, args.epochs):
        loader.sampler.set_epoch(epoch)
        for i, (images, labels) in enumerate(bar := tqdm(loader, f"epoch {epoch}", disable=rank > 0), start=1):
            images, labels, update = images.to(device), labels.to(device), i % args.accumulate == 0 or i == len(loader)
            model.require_backward_grad_sync = update  # as DDP's no_sync(): gradients are averaged once an update
            with torch.autocast(device.type, getattr(torch, args.amp), enabled=args.amp != "float32"):
                loss, attn_a = criterion(model(images), labels), attention.take()
                loss, attn_b = loss + criterion(model(acr.view(images)), labels), attention.take()
                consistency, terms = acr(attn_a, attn_b, return_terms=True)
            scaler.scale((loss + consistency) / args.accumulate).backward()
            del attn_a, attn_b  # they hold the graph
            history.append({"classes": loss.item(), **{name: term.item() for name, term in terms.items()}})
            bar.set_postfix(history[-1])
            for name, value in history[-1].items() if writer else ():
                writer.add_scalar(f"train/{name}", value, epoch * len(loader) + i)
            if update:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                ema.update_parameters(plain)
        if rank == 0:
            print(f"epoch {epoch}: {history[-1]}")
            torch.save((epoch + 1, [part.state_dict() for part in parts]), path)
    attention.remove()
    if writer:
        writer.close()
    return plain, ema, history


if __name__ == "__main__":
    main()
