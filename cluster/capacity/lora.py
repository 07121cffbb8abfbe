"""Which architectures vLLM can load adapters onto (LoRA). A fleet of any other is served without places for them.

Asking vLLM itself would cost its import, ten seconds, before anything starts. A contract test compares this list with its registry.
"""

from collections.abc import Mapping
from typing import Any, cast

WITHOUT_ADAPTERS = """
AriaForConditionalGeneration BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM BeeForConditionalGeneration BertForMaskedLM
BertForSequenceClassification BertForTokenClassification BertModel BertSpladeSparseEmbeddingModel BgeM3EmbeddingModel BloomForCausalLM
CLIPModel Cohere2MoeForCausalLM Cohere2VisionForConditionalGeneration CohereAsrForConditionalGeneration ColBERTJinaRobertaModel
ColBERTLfm2Model ColBERTModernBertModel ColModernVBertForRetrieval Cosmos3EdgeForConditionalGeneration DbrxForCausalLM
DeepseekVLV2ForCausalLM DiffusionGemmaForBlockDiffusion Dots3NoteForCausalLM FalconForCausalLM FalconMambaForCausalLM
FireRedASR2ForConditionalGeneration FunASRForConditionalGeneration FunAudioChatForConditionalGeneration GPT2ForSequenceClassification
GPT2LMHeadModel GPTJForCausalLM GPTNeoXForCausalLM Gemma3TextModel Gemma3nForCausalLM Gemma3nForConditionalGeneration GteModel
GteNewForSequenceClassification GteNewModel HCXVisionV2ForCausalLM HF_ColBERT HfMoondream HrmTextForCausalLM IQuestLoopCoderForCausalLM
JinaForRanking KananaVForConditionalGeneration KimiK25ForConditionalGeneration KimiK3ForConditionalGeneration KimiLinearForCausalLM
KimiVLForConditionalGeneration LlavaOnevision2ForConditionalGeneration LlavaOnevisionForConditionalGeneration Mamba2ForCausalLM
MambaForCausalLM MiDashengLMModel MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiMoV2OmniForCausalLM MiniMaxM3SparseForCausalLM
MiniMaxM3SparseForConditionalGeneration ModernBertForSequenceClassification ModernBertForTokenClassification ModernBertModel
Moondream3ForCausalLM MoonshotKimiaForCausalLM MossTranscribeDiarizeForConditionalGeneration NemotronH_Nano_Omni_Reasoning_V3
NemotronH_Nano_VL_V2 NemotronH_Omni_Reasoning_V3 NemotronH_Super_Omni_Reasoning_V3 NemotronParseForConditionalGeneration NomicBertModel
OpenAIPrivacyFilterForTokenClassification OpenVLAForActionPrediction OrionForCausalLM Ovis Ovis2_5 Ovis2_6ForCausalLM Ovis2_6_MoeForCausalLM
PaddleOCRVLForConditionalGeneration Phi3VForCausalLM Phi4ForCausalLMV Qwen2AudioForConditionalGeneration RForConditionalGeneration
RobertaForMaskedLM RobertaForSequenceClassification RobertaForTokenClassification RobertaModel SiglipModel SkyworkR1VChatModel
StableLmForCausalLM Step1ForCausalLM Step3TextForCausalLM Step3VLForConditionalGeneration Step3p5ForCausalLM Step3p7ForConditionalGeneration
StepVLForConditionalGeneration Terratorch VoyageQwen3BidirectionalEmbedModel XLMRobertaForSequenceClassification
XLMRobertaForTokenClassification XLMRobertaModel Zamba2ForCausalLM
"""
"""Architectures of vLLM 0.29 whose models are no ``SupportsLoRA``. What vLLM does not know by name it runs by transformers, with adapters."""


def takes_adapters(config: Mapping[str, Any]) -> bool:
    """Whether vLLM loads adapters onto the model of a raw config.json. It takes the first architecture that is named.

    >>> takes_adapters({"architectures": ["LlamaForCausalLM"]}), takes_adapters({"architectures": ["BertModel"]})
    (True, False)
    """
    named: Any = config.get("architectures")
    first: Any = cast(list[Any], named)[0] if isinstance(named, list) and named else ""
    return first not in WITHOUT_ADAPTERS.split() if isinstance(first, str) else True
