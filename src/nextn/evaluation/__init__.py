"""Measuring a trained model.

held_out       a checkpoint on text that it was not trained on
free_running   acceptance by decoding, while training and beside plain decoding; results: their figures
repetition     how much of a text repeats itself; interleaving: the order in which timed arms take turns
prompts        sets of prompts by name; completions: prompts cut from texts
conventions    accuracy under each convention; diagnosed: of a checkpoint that `nextn doctor` examined
tasks          lm-evaluation-harness; harness: the model as the harness calls it
"""
