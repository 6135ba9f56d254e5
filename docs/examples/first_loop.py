"""The loop of README.md, with the lines that it adds."""

import timm
import torch

from acr_reg import AllPairsConsistencyLoss, HorizontalFlip, capture_attention

model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=20)
optimizer, criterion = torch.optim.AdamW(model.parameters(), 1e-4), torch.nn.MultiLabelSoftMarginLoss()
loader = [(torch.rand(2, 3, 64, 64), torch.eye(20)[:2])]  # stands for your photos and labels
attention = capture_attention(model)
acr = AllPairsConsistencyLoss(HorizontalFlip())
for images, labels in loader:
    loss = criterion(model(images), labels)
    attn_a = attention.take()
    loss += criterion(model(acr.view(images)), labels)
    attn_b = attention.take()
    loss += acr(attn_a, attn_b)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    del attn_a, attn_b  # frees the graph
