"""Evaluations: questions with known answers and likelihoods, asked of any engine. The option's class is what `_target_` names."""
