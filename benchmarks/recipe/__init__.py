"""20-class VOC with MCTformer+, without and with ACR: a recipe for those who have the data and a GPU."""
