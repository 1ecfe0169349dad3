"""Experiments of quality. They sleep at barriers as the commands do, so that two may run beside each other."""

from clora.cli.app import limit_spinning

limit_spinning()
