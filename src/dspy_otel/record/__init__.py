"""Our own spans read back, once, into typed and immutable records.

* :mod:`.model` - the records: optimizations, their phases, trials and candidates; evaluations, examples, usage;
* :mod:`.spans` - one span to one record: the only place that reads attributes;
* :mod:`.history` - spans as they start and end to records that are complete: trials with what had been spent,
  evaluations with their examples;
* :mod:`.otlp` - files of OTLP to spans, and back;
* :mod:`.addresses` - where a backend shows the optimizations of this process;
* :mod:`.stored` - records to flat names and values and tables, as a backend keeps them, and back.

Nothing here imports DSPy or a backend, or reads or writes anything.
"""
