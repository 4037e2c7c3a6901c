"""Linear attention: feature maps, one engine in two forms, the layer and its cache."""
