"""Floor 8: the process beside the window, which has torch, the loaded model and its embeddings.

Run as ``python -m napari_resfinetune.engine``. `process` speaks with the window, `data_verbs` and `model_verbs` do what
it asks for, `memory` keeps what is likely to be asked for again.
"""
