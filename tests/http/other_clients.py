"""What LangChain and LiteLLM get; run by the environment that has them: URL KEY PROMPT."""

import json
import sys

url, key, prompt = sys.argv[1:]
messages = [{"role": "user", "content": "Tell me of the king"}]


def by_langchain() -> dict[str, object]:
    from langchain_openai import ChatOpenAI, OpenAI

    text = OpenAI(
        model="live", base_url=f"{url}/v1", api_key=key, max_tokens=12, temperature=0.7, seed=3, max_retries=0
    )
    chat = ChatOpenAI(model="live", base_url=f"{url}/v1", api_key=key, max_tokens=6, seed=2, max_retries=0)
    return {
        "text": text.invoke(prompt),
        "streamed": "".join(text.stream(prompt)),
        "chat": chat.invoke([("user", messages[0]["content"])]).content,
        "chat_streamed": "".join(str(part.content) for part in chat.stream([("user", messages[0]["content"])])),
    }


def by_litellm() -> dict[str, object]:
    import litellm

    where = {"api_base": f"{url}/v1", "api_key": key, "max_retries": 0}
    asked = {"model": "text-completion-openai/live", "prompt": prompt, "max_tokens": 12, "temperature": 0.7, "seed": 3}
    chatted = {"model": "openai/live", "messages": messages, "max_tokens": 6, "seed": 2}
    return {
        "text": litellm.text_completion(**asked, **where).choices[0].text,
        "streamed": "".join(
            part.choices[0].text or "" for part in litellm.text_completion(**asked, **where, stream=True)
        ),
        "chat": litellm.completion(**chatted, **where).choices[0].message.content,
        "chat_streamed": "".join(
            part.choices[0].delta.content or "" for part in litellm.completion(**chatted, **where, stream=True)
        ),
    }


print(json.dumps({"langchain": by_langchain(), "litellm": by_litellm()}))
