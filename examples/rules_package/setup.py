"""Compiles the rules into the wheel."""

from setuptools import setup

from emerging_optimizers.packaging import cmdclass

setup(cmdclass=cmdclass)
