"""How a policy acts: environment wrappers, closed-loop evaluation, a policy server and its client. No TensorFlow."""
