"""The photos of the demo and of the study: their folder, the pretrained network, the task."""
