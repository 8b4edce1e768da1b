"""CoreInfer and GRIFFIN: one set of neurons a layer, chosen from the prompt and fixed while its answer is decoded."""
