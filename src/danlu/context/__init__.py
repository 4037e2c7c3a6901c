"""Reading past the training length: methods, extend, evaluation by length, reports."""
