"""What is checked on every sample: each check is a small function, and one table explains them.

    check_table.py   the table, and the faults that a sample is found to have
    turn_faults.py   of a turn in the rendered text: prompt, marks, thoughts, end
    shown.py         ... what the template leaves out of it
    token_faults.py  of its tokens

A check says what is wrong, or nothing. `strict` turns a failed check of level "error" into a
refusal of the row; else its name is noted in the sample's `faults`.
"""
