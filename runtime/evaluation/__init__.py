"""Does a quantized model still say what it should?

text estimate      windows of tokens; means and quantiles with their standard errors
scorer compare layers      a model's logits; two models side by side; which layer goes wrong first
perplexity         by recipes that are named with every number
tasks harness local_tasks  questions through lm-eval, paired with a reference
gate               a baseline file and an exit status
chart figures      SVG, readable in light and dark
command            ``relinear eval``
"""
