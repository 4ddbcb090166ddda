"""The pieces of the rewriter: control flow, products, views of packed weights, loop steps, partition specs."""
