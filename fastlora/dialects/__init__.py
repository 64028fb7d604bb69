"""How single adapter files name and scale the modules of image and video models: tensors' suffixes, prefixes of
components, the families of models with the names of their modules, and what the readers of such files make of them."""
