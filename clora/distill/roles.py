"""Names of adapters and of who draws a batch."""

from __future__ import annotations

from typing import Literal

# The student's slots; the second holds the acceleration LoRA that joins after the coarse stage, where there is one. In
# `clora extend` the student lies on top of the collection, which is frozen.
STUDENT, ACCELERATION, CRITIC, COLLECTION = "student", "student_acceleration", "critic", "collection"
ACCELERATING = "teacher_acceleration"  # the same LoRA, frozen: it makes few-step teachers

TARGET_BATCH = 24  # samples in one forward while targets are made, at most

Role = Literal["coarse", "student", "anchor", "critic"]
