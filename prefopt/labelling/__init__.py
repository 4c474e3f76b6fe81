"""The statistics beneath `prefopt.label_model` and `prefopt.judging_plan`. Imports nothing at once."""
