"""What the judge is asked: the paper's templates for bad cases (Fig. 11) and for subject alignment (Fig. 12).

The paper names four pictures without an order. Here each picture stands behind its name, in the order of
`GATE_PICTURES` and `ALIGNMENT_PICTURES`. Instructions and criteria are put in as JSON strings, so that no quotation
mark in them ends the sentence they stand in.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

GATE_PICTURES = ("Template Source Image", "Template Result Image", "Test Source Image", "Test Result Image")
ALIGNMENT_PICTURES = ("Test Source Image", "Test Result Image")

GATE = """\
You are an expert data evaluator specializing in assessing image special-effect editing. You will receive four sets of \
input information:

1. Editing Instruction: Text describing the desired editing effect.
2. Reference Template Image Pair (including the "Template Source Image" and "Template Result Image"): Serves as the \
Visual Ground Truth, defining the ideal transformation logic and stylistic standard for the instruction.
3. Test Image Pair (including the "Test Source Image" and "Test Result Image"): The target subject for evaluation.
4. Expert Evaluation Criteria: Standards defined by experts to assess whether the test images meet the specified \
requirements.

Your sole task is to determine whether the test image pair is a Bad Case based on the expert evaluation criteria and \
the transformation logic demonstrated by the reference template.

Note: Do not overly focus on the texture or minor details of the test image pair. A case should only be judged as a \
"bad case" if there is a clear and explicit violation of the expert evaluation criteria.

Output Format Requirements:

Please output strictly in standard JSON format. Do not include Markdown code blocks or any other textual explanation. \
The JSON structure is as follows:

{{
  "brief_reasoning": "Briefly state the reasoning based on the criteria (under 20 words).",
  "is_bad_case": <true/false>
}}

Current Editing Instruction: {instruction}

Current Expert Evaluation Criteria: {criteria}"""

ALIGNMENT = """\
You are an expert data evaluator specializing in assessing image special-effect editing. You will receive two sets of \
input information:

1. Editing Instruction: Text describing the desired editing effect.
2. Test Image Pair (including the "Test Source Image" and "Test Result Image"): The target subject for evaluation.

Your task is to evaluate whether the core semantic identity of the subject in the source image is preserved after the \
special effect is applied. The specific evaluation criteria are as follows:

Note: For heavy stylization or deformation tasks, please base your judgment on "semantic recognizability" rather than \
pixel-level alignment.

- Score 1: The subject is lost or unrecognizable.
- Score 2: The subject is severely distorted, with key features lost.
- Score 3: The subject is generally recognizable, but there is noticeable loss of non-essential features.
- Score 4: Identity is well-preserved; changes are strictly limited to those required by the special effect.
- Score 5: The subject's demeanor and core features are perfectly preserved.

Output Format Requirements:

Please output strictly in standard JSON format. Do not include Markdown code blocks or any other textual explanation. \
The JSON structure is as follows:

{{
  "brief_reasoning": "Briefly state the reasoning based on the criteria (under 20 words).",
  "scores": <1-5>
}}

Current Editing Instruction: {instruction}"""


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    brief_reasoning: str = Field(max_length=2000)


class GateReply(_Reply):
    is_bad_case: bool

    @property
    def value(self) -> bool:
        return self.is_bad_case


class AlignmentReply(_Reply):
    scores: int = Field(ge=1, le=5)

    @property
    def value(self) -> int:
        return self.scores


def quoted(text: str) -> str:
    """Text as one JSON string, without line breaks of its own."""
    return json.dumps(" ".join(text.split()), ensure_ascii=False)


def reply_schema(value: str) -> dict[str, Any]:
    """The JSON schema of a reply, in the subset that all servers know: every field required, nothing besides."""
    kinds: dict[str, dict[str, Any]] = {
        "is_bad_case": {"type": "boolean"},
        "scores": {"type": "integer", "enum": [1, 2, 3, 4, 5]},
    }
    return {
        "type": "object",
        "properties": {"brief_reasoning": {"type": "string"}, value: kinds[value]},
        "required": ["brief_reasoning", value],
        "additionalProperties": False,
    }
