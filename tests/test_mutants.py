"""`mutants.py` still applies to the code: what it changes is there once."""

import mutants


def test_no_mutant_is_stale():
    texts = {mutant.file: (mutants.ROOT / mutant.file).read_text() for mutant in mutants.MUTANTS}
    assert [mutant.name for mutant in mutants.MUTANTS if texts[mutant.file].count(mutant.old) != 1] == []
