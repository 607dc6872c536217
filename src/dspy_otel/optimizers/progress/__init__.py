"""Running optimizations on the screen: from their own state, in a terminal or in a notebook.

* :mod:`.view` - what is shown of one optimization, and the words for it; :mod:`.display` - which optimizations are
  shown, and where;
* :mod:`.terminal` - lines below what the program writes, by rich; :mod:`.streams` - what the program writes meanwhile;
* :mod:`.notebook` - a table in the output of a cell.
"""
