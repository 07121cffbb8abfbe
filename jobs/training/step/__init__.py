"""How one worker computes a step: packed rows, the vocabulary's loss, precision, flat parameters. What makes training fast is here."""
