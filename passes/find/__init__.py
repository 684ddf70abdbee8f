"""Find attention blocks in a normalised graph: from a core back to what it reads.

`sites.find` reads every core, one after another. Its steps, and where they are:

    twins      a block whose graph equals one that was read takes over what is known of that one
    streams    q, k, v: from the core back to one linear layer, or to the model's own steps
      steps      rows of the layer, norms, rotation, factor: by running what stands between
      rotary     the rotation, fitted to what unit vectors become at every position
      growth     a factor of queries that grows with position
      opaque     where a stream may begin that no linear layer begins
      shared     keys and values that another block made
      stored     which rows of a stored tensor a layer's weight is
    sources    which tensors of the owner's call the streams begin at
    masks      what the core hides: the mask is run on small inputs and classified
      relative, alibi   biases per head and distance inside of a mask
    exits      through layout to the output projection
      joins      a gate before it, or the model's own steps
    latent     blocks that already are multi-head latent attention

`owners` says which module's code a node comes from, `programs` cuts a part out as plain data, and
`reasons.NotUnderstood` is how every step says that it met something else: the core is then
`Missed`, with that sentence.
"""
