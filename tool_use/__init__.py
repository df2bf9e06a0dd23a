"""Tools that a model calls, and environments made of them."""

from tool_use.agent_env import AgentLimits, AgentToolMessageEnv, RewardFn, build_agent_tool_env, zero_reward
from tool_use.group_builder import ToolEnvGroupBuilder
from tool_use.parsing import register_tool_parser
from tool_use.rehearsal import rehearse
from tool_use.tools import FunctionTool, tool
from tool_use.types import ErrorKind, InvalidArguments, Tool, ToolResult

__all__ = [
    "AgentLimits",
    "AgentToolMessageEnv",
    "ErrorKind",
    "FunctionTool",
    "InvalidArguments",
    "RewardFn",
    "Tool",
    "ToolEnvGroupBuilder",
    "ToolResult",
    "build_agent_tool_env",
    "register_tool_parser",
    "rehearse",
    "tool",
    "zero_reward",
]
