"""What the capture, the loss, class maps and scores cost, compared with the published procedure."""
