"""The memory engine: models larger than the device. No model is named here; everything works on an ordered list of blocks.

    transport = open_transport(device)
    recompute = Recompute(blocks, selective, Offload(transport) or None)      activations: recompute.py, offload.py
    boundaries = Boundaries(blocks)                                           the only hooks on blocks: boundaries.py
    streaming = Streaming(boundaries, evenly(len(blocks), n), recompute.blocks, transport, look_ahead)
    streaming.move_rest(model)                                                load the model on the CPU before
    optimizer = table.build(...)                                              only now: it looks at devices
    updater = StepInBackward(optimizer, groups, schedule, unit, boundaries, streaming, rounding, ...)

    for each micro-batch:   updater.begin_microbatch(step, total_steps, last)      before its forward pass
                            loss.backward()
                            updater.after_backward(step, total_steps, last)
    to save, load, export:  with streaming.host_weights(): ...;  updater.state_dict(), updater.load_state_dict(state)
    to end:                 updater.detach(); streaming.detach(); boundaries.detach(); recompute.detach()

From the bottom up: transport.py (streams and events, or memcpys), layout.py (tensors in flat regions), ring.py (N blocks pass
through S slots), schedule.py (who is wanted when), streaming.py (weights), partial.py (sums of gradients), states.py
(optimizer states), in_backward.py (steps), bytes.py (what all this takes and copies).
"""
