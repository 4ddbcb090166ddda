"""Reading a jaxpr: where values come from, which equations read which parameter, and what each is called."""
