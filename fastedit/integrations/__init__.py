"""Drop-in acceleration of other editing libraries: their scripts, our kernels, the same numbers.

- :mod:`.patching`: replaces functions of another project, only in versions that are known, and puts them back;
- :mod:`.report`: what was replaced, what was left alone, what fell back, and why;
- :mod:`.research`: the research repositories of ROME, MEMIT, AlphaEdit, NSE, EMMET and UltraEdit;
- :mod:`.easyedit`: EasyEdit.
"""
