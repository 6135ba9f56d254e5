"""The study's tables of why views other than the flip lose: distances before training, and the cells that test causes."""

FLOOR = "floor.json"
