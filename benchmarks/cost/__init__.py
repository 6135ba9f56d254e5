"""What the capture, the loss, class maps and scores cost, beside the published procedure."""
