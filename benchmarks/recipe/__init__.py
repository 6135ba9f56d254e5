"""20-class VOC with MCTformer+, without and with ACR: a recipe for whoever has the data and a GPU."""
