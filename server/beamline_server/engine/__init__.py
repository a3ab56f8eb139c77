"""The engine: beam search over many requests at once, step by step, on plain ONNX graphs.

The idea
--------
A decoder computes one token per *step* for every running *sequence* - one source with its search. Nobody waits for
anybody: a request starts at any step at which there is room and leaves at the step at which its search is over. Its
answer does not depend on who else is there, to the last bit.

A sequence has a place in one *table* of arrays, at its *index*, which one thread owns. Its live hypotheses are *rows*:
what a step computes. A prefix that a request gives is fed as rows, too, several tokens at a time. All rows of all
sequences are packed one after another, so matrix products see no padding, and nothing but a row's own numbers enters
its result.

Keys and values of a sequence lie in *slots*. All hypotheses of a sequence share its slots: a hypothesis is the set of
slots that it descends from, and attends to just these. When a search goes on with other hypotheses than before, these
sets change and no key or value is moved.

    step                          source: "Le chat dort."                  slots of each hypothesis
    0   feed the decoder start    one row, in slot 0                       {0}
    1   keep the best two         "The" in slot 1, "A" in slot 2           {0 1}  {0 2}
    2   both continue "The"       "cat" in slot 3, "kitten" in slot 2      {0 1 3}  {0 1 2}

"A" is given up, so its slot is free, and is taken again at once: lowest first.

The step
--------
`step.EngineCore.step`, but for what goes wrong:

    admit(queue, room)                                  who starts: encode the sources, write requests into the table
    for bucket in cache.place(table, going):            room for every row, where the backend wants it
        result = bucket.run(table)                      one run of the decoder: the best C continuations of each row
        decide(table, bucket.members, result)           per sequence: rank, finish, continue; rows of the next step
    deliver(table)                                      pieces, answers; who is done leaves

Where things are
----------------
    request.py errors.py observer.py   what is asked, answered, refused, told
    workers.py                         threads, each with a core; the engine that others see
    ledger.py pace.py                  who holds how much and how fast workers are: who is refused, and until when
    queue.py shares.py admission.py    who waits, who starts: fair shares, deadlines, cost in rows and slots
    turns.py                           who goes in a step
    step.py                            the step
    table.py                           the running sequences as arrays
    search.py processors.py            one step of one search; what may change its candidates
    backend.py                         what a backend has to do: encode, place, run
    pack.py                            what sequences need in a step; sources as an encoder's inputs
    ort/                               the backends, on onnxruntime: cpu.py attends over slots where they are,
                                       cuda/ runs sequences of like length together in rectangles
    compiled.py code_cache.py          compile the loops of all these; keep the machine code

Decide, then do: admission, search and packing are functions of the table and a request; the core alone changes who
runs. Compiled loops have no state but the table's arrays.
"""
