"""One tool as each family describes it to the model (loaded by path: tests/ is no package)."""

from __future__ import annotations

import json

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"type": "string", "enum": ["m", "km"], "default": "m"},
                "a": {"type": "integer", "description": "First"},
                "more": {"type": "array", "items": {"type": "number"}},
                "Any": {"type": "array"},
                "note": {"type": ["string", "null"]},
                "how": {
                    "type": "object",
                    "properties": {"exact": {"type": "boolean"}},
                    "required": ["exact"],
                },
            },
            "required": ["a"],
        },
    },
}
TOOL_JSON = json.dumps(TOOL)

GRANITE_TOOLS = (
    "You are a helpful assistant with access to the following tools. You may call one or more "
    "tools to assist with the user query.\n\nYou are provided with function signatures within "
    f"<tools></tools> XML tags:\n<tools>\n{TOOL_JSON}\n</tools>\n\nFor each tool call, return a "
    "json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>. If a '
    "tool does not exist in the provided list of tools, notify the user that you do not have the "
    "ability to fulfill the request."
)

QWEN_TOOLS = (
    "# Tools\n\nYou have access to the following functions:\n\n<tools>\n"
    f"{TOOL_JSON}\n</tools>\n\nIf you choose to call a function ONLY reply in the following format "
    "with NO suffix:\n\n<tool_call>\n<function=example_function_name>\n"
    "<parameter=example_parameter_1>\nvalue_1\n</parameter>\n<parameter=example_parameter_2>\n"
    "This is the value for the second parameter\nthat can span\nmultiple lines\n</parameter>\n"
    "</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the "
    "specified format: an inner <function=...></function> block must be nested within "
    "<tool_call></tool_call> XML tags\n- Required parameters MUST be specified\n- You may provide "
    "optional reasoning for your function call in natural language BEFORE the function call, but "
    "NOT after\n- If there is no function call available, answer the question like normal with "
    "your current knowledge and do not tell the user about function calls\n</IMPORTANT>"
)

GLM_TOOLS = (
    "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    f"{TOOL_JSON}\n</tools>\n\nFor each function call, output the function name and arguments "
    "within the following XML format:\n<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n"
    "<arg_value>{arg-value-1}</arg_value>\n<arg_key>{arg-key-2}</arg_key>\n"
    "<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>"
)

GEMMA_TOOL = (
    "<|tool>declaration:add{description:^Adds^,parameters:{properties:{"
    "a:{description:^First^,type:^INTEGER^},Any:{type:^ARRAY^},"
    "how:{properties:{exact:{type:^BOOLEAN^}},required:[^exact^],type:^OBJECT^},"
    "more:{items:{type:^NUMBER^},type:^ARRAY^},note:{type:^STRING^},"
    "unit:{enum:[^m^,^km^],type:^STRING^}},required:[^a^],type:^OBJECT^}}<tool|>"
).replace("^", '<|"|>')

COHERE_TOOLS = (
    "## Available Tools\nHere is the list of tools that you have available to you.\nYou can ONLY "
    "use the tools listed here. When a tool is not listed below, it is NOT available and you "
    "should NEVER attempt to use it.\nEach tool is represented as a JSON object with fields like "
    '"name", "description", "parameters" (per JSON Schema), and optionally, "responses" (per JSON '
    'Schema).\n\n```json\n[\n    {"name": "add", "description": "Adds", "parameters": '
    + json.dumps(TOOL["function"]["parameters"])  # type: ignore[index]
    + ', "responses": null}\n]\n```'
)

HARMONY_TOOL = (
    "# Tools\n\n## functions\n\nnamespace functions {\n\n// Adds\ntype add = (_: {\n"
    'unit?: "m" | "km", // default: m\n// First\na: number,\nmore?: number[],\n'
    "Any?: any[],\nnote?: string | null,\n"
    "how?: {\nexact: boolean,\n},\n}) => any;\n\n} // namespace functions"
)
