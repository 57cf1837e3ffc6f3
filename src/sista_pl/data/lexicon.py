"""The words of chest radiographs: findings, the anatomy and states they are put together from, sides and zones.

Phrases are lower-case, in the singular (`singular` is applied to both sides), parted by `|`.
"""

from __future__ import annotations

from functools import lru_cache

_IRREGULAR = {
    "apices": "apex",
    "apical": "apex",
    "bihilar": "hilum",
    "biapical": "biapex",
    "bases": "base",
    "basal": "base",
    "basilar": "base",
    "bibasal": "bibase",
    "bibasilar": "bibase",
    "diaphragms": "diaphragm",
    "granulomata": "granuloma",
    "hila": "hilum",
    "hilar": "hilum",
    "masses": "mass",
    "metastases": "metastasis",
    "perihilar": "perihilum",
    "pneumothoraces": "pneumothorax",
    "vertebrae": "vertebra",
    "vertebral": "vertebra",
}


@lru_cache(maxsize=65536)
def singular(word: str) -> str:
    """Return an English word's singular, near enough to compare words; a word such as "atelectasis" stays."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word[-1] == "s" and word[-2] not in "siu":
        return word[:-1]
    return word


# Finding → phrases that name it by themselves.
FINDINGS: dict[str, str] = {
    # lung
    "opacity": "opacity|opacification|opacified|shadowing|haziness|hazy|ground glass|airspace opacity|"
    "air space opacity|alveolar opacity|airspace opacification|interstitial opacity",
    "density": "density|hyperdensity|soft tissue density",
    "airspace disease": "airspace disease|air space disease|airspace process|alveolar disease|parenchymal disease",
    "consolidation": "consolidation|consolidative|consolidated",
    "infiltrate": "infiltrate|infiltration|infiltrative",
    "pneumonia": "pneumonia|pneumonitis|bronchopneumonia|infectious process|infection|aspiration",
    "atelectasis": "atelectasis|atelectatic|atelectases|subsegmental collapse|lobar collapse|collapse of",
    "volume loss": "volume loss|loss of volume|loss of lung volume",
    "edema": "edema|oedema|kerley",
    "vascular congestion": "vascular congestion|pulmonary congestion|venous congestion|congestion|"
    "vascular engorgement|cephalization|engorged|vascular prominence|pulmonary venous hypertension|"
    "vascular redistribution|fluid overload",
    "heart failure": "heart failure|cardiac failure|chf|cardiac decompensation|decompensation",
    "interstitial markings": "interstitial marking|bronchovascular crowding|crowding|bronchovascular marking|"
    "interstitial prominence|prominent marking|prominent interstitium|lung marking|interstitial thickening|"
    "reticular marking|coarse marking|interstitial change|coarsened interstitium|interstitial opacity|"
    "interstitial disease|interstitial pattern|peribronchial cuffing|vascular crowding|marking|increased interstitium|"
    "interstitial coarsening|interstitial scarring",
    "interstitial lung disease": "interstitial lung disease|chronic interstitial disease|honeycombing",
    "hypoinflation": "hypoinflation|hypoinflated|hypoaeration|hypoventilation|poor inspiration|shallow inspiration|"
    "suboptimal inspiration|low inspiratory|poor inspiratory|hypoventilatory|underinflation|low volume|underinflated|"
    "hypoexpanded|hypoexpansion|low inspiration|decreased inspiration|limited inspiration|hypoventilated|"
    "low lung volume|incomplete inspiration|poor aeration|shallow inspiratory|decreased inspiratory|low lung",
    "hyperinflation": "hyperinflation|hyperinflated|hyperexpanded|hyperexpansion|hyperaeration|hyperaerated|"
    "overinflated|overinflation|air trapping|increased lung volume|large lung volume|hyperdistention|hyperdistended|"
    "hyperdistension|overexpansion|overexpanded",
    "emphysema": "emphysema|emphysematous|bulla|bullae|bullous|bleb",
    "copd": "copd|chronic obstructive|obstructive pulmonary disease|obstructive lung disease|obstructive disease",
    "lucency": "lucency|hyperlucency|hyperlucent|lucent|radiolucency",
    "nodule": "nodule|nodular|nodularity|micronodule",
    "mass": "mass|mass like|masslike",
    "malignancy": "metastasis|metastatic|neoplasm|malignancy|tumor|carcinoma|cancer|lymphoma",
    "lesion": "lesion",
    "granuloma": "granuloma",
    "calcified granuloma": "calcified granuloma|calcific granuloma|granulomatous calcification",
    "granulomatous disease": "granulomatous|histoplasmosis|granulomatous infection|calcified granulomatous disease|"
    "calcified granulomatous",
    "calcification": "calcification|calcified|calcific",
    "scar": "scar|scarring|scarred|cicatrix|pleuroparenchymal change|fibrotic scar|postinflammatory change",
    "fibrosis": "fibrosis|fibrotic",
    "bronchiectasis": "bronchiectasis|bronchiectatic",
    "bronchial thickening": "peribronchial thickening|bronchial wall thickening|bronchitis|bronchial thickening",
    "cavity": "cavitation|cavitary|cavity",
    "cyst": "cyst|cystic",
    "tuberculosis": "tuberculosis|tb",
    # pleura
    "pleural effusion": "effusion|pleural fluid|hydrothorax|hydropneumothorax|hemothorax|fluid in the fissure",
    "pneumothorax": "pneumothorax|hydropneumothorax",
    "pleural thickening": "pleural thickening|thickening|pleural plaque|thickened pleura|pleural cap|"
    "pleural based density",
    "costophrenic angle blunting": "blunting|blunted",
    # heart, vessels, mediastinum
    "cardiomegaly": "cardiomegaly|cardiac enlargement|enlarged heart|heart enlargement|cardiac hypertrophy",
    "enlarged cardiac silhouette": "enlarged cardiac silhouette|enlarged cardiomediastinal silhouette|"
    "enlargement of the cardiac silhouette|enlargement of cardiac silhouette|enlarged cardiac contour|"
    "enlarged cardiac shadow|prominent cardiac silhouette|enlargement of the cardiomediastinal silhouette",
    "pericardial effusion": "pericardial effusion",
    "enlarged mediastinum": "mediastinal widening|widened mediastinum|mediastinal enlargement|mediastinal mass",
    "mediastinal shift": "mediastinal shift|tracheal deviation|tracheal shift|cardiomediastinal shift",
    "lymphadenopathy": "lymphadenopathy|adenopathy",
    "tortuous aorta": "tortuous|tortuosity|uncoiled|unfolded|unfolding|ectatic|ectasia",
    "aortic aneurysm": "aneurysm|aneurysmal",
    "atherosclerosis": "atherosclerosis|atherosclerotic|arteriosclerotic|arteriosclerosis|atheromatous",
    "pulmonary artery enlargement": "pulmonary arterial hypertension|pulmonary hypertension|"
    "pulmonary artery hypertension|pulmonary artery enlargement|prominent pulmonary artery|enlarged pulmonary artery",
    "epicardial fat": "epicardial fat|fat pad|pericardial fat|epipericardial fat|mediastinal fat",
    "hiatal hernia": "hiatal hernia|hiatus hernia|hernia",
    # diaphragm and below
    "elevated diaphragm": "elevated hemidiaphragm|elevated diaphragm|elevated right hemidiaphragm|"
    "elevated left hemidiaphragm",
    "flattened diaphragm": "flattened diaphragm|flattened hemidiaphragm",
    "eventration": "eventration",
    "pneumoperitoneum": "pneumoperitoneum|free air|free intraperitoneal air|free subdiaphragmatic air|"
    "subdiaphragmatic free air|free intra abdominal air|intraperitoneal air",
    # bones and soft tissue
    "degenerative spine": "degenerative|degeneration|degenerated|endplate change|spondylitic|disc disease|disk disease",
    "spondylosis": "spondylosis",
    "osteophyte": "osteophyte|osteophytosis|osteophytic|spurring|spur|syndesmophyte|bridging",
    "scoliosis": "scoliosis|levoscoliosis|dextroscoliosis|scoliotic|dextrocurvature|levocurvature|dextro curvature|"
    "levo curvature|dextroconvex|levoconvex|s shaped|rotoscoliosis|lateral curvature",
    "kyphosis": "kyphosis|kyphotic|kyphoscoliosis",
    "fracture": "fracture|fractured|broken|compression fracture",
    "bone deformity": "deformity|wedging|compression deformity|compression fracture|vertebra compression",
    "osteopenia": "osteopenia|osteopenic|osteoporosis|osteoporotic|demineralization|demineralized|"
    "decreased bone density|decreased bone mineralization|bony demineralization",
    "arthritis": "arthritis|osteoarthritis|arthropathy|arthritic|osteoarthritic",
    "sclerosis": "sclerosis|sclerotic",
    "hyperostosis": "hyperostosis|dish|ankylosis|ankylosing",
    "dislocation": "dislocation|subluxation|dislocated",
    "chest wall deformity": "pectus|funnel chest|carinatum|excavatum",
    "subcutaneous emphysema": "subcutaneous emphysema|subcutaneous air|subcutaneous gas|pneumomediastinum",
    # devices and surgery
    "catheter": "catheter|picc|port a cath|portacath|portacatheter|mediport|central line|subclavian line|port|"
    "infusaport|jugular line|central venous line|venous line|shunt|swan ganz|dialysis line|tip of the line|"
    "chemotherapy port|ij line|powerport|picc line|line and tube|tube and line|support line",
    "tube": "endotracheal tube|ng tube|nasogastric tube|chest tube|enteric tube|feeding tube|tracheostomy|et tube|"
    "gastrostomy|dobhoff|ett|nasogastric|tube|thoracostomy",
    "implanted device": "pacemaker|aicd|icd|pacer|defibrillator|valve replacement|stimulator|generator|prosthesis|"
    "prosthetic|arthroplasty|pacing|pacing lead|closure device|occluder|bone anchor|internal fixation|neurostimulator|"
    "heart valve|cardiac valve|loop recorder|pacing device|implanted device|joint replacement|shoulder replacement",
    "surgical material": "surgical clip|clip|suture|surgical staple|staple|sternal wire|sternotomy wire|cerclage|"
    "vascular clip|embolization coil|coil|mesh|surgical material",
    "stent": "stent|stented|endograft|stent graft",
    "spinal fusion": "fusion|spinal hardware|spinal rod|harrington|fixation|orthopedic hardware|hardware|"
    "cervical plate|laminectomy",
    "medical device": "monitor lead|external lead|ekg lead|ecg lead|monitoring lead|telemetry lead|medical device|"
    "external device|overlying lead|monitoring device|electronic device",
    "foreign body": "foreign body|bullet|shrapnel|metallic fragment|bb|pellet|jewelry|necklace|metallic foreign|"
    "radiopaque foreign|metallic density",
    "postoperative change": "pneumonectomy|lobectomy|mastectomy|resection|thoracotomy|sternotomy|cabg|bypass|"
    "postoperative|postsurgical|post surgical|cholecystectomy|post operative",
    "breast implant": "breast implant|breast prosthesis|breast augmentation",
    "nipple shadow": "nipple shadow|nipple",
    "contrast": "contrast material|oral contrast|barium|contrast media|enteric contrast",
    # the picture itself
    "limited image": "suboptimal|limited study|limited exam|limited examination|underpenetrated|rotated|"
    "patient rotation|technically limited|limited evaluation|motion artifact|markedly limited|limited by|poor quality|"
    "underexposed|overexposed|limited quality|study is limited|exam is limited|examination is limited",
}

# Parts of pairs: anatomy and states.
PARTS: dict[str, str] = {
    "HEART": "heart|cardiac|heart size|cardiac size|heart shadow",
    "SILHOUETTE": "cardiac silhouette|cardiomediastinal silhouette|cardiac shadow|cardiac contour|heart silhouette|"
    "cardio mediastinal silhouette|cardiomediastinal contour|cardiopericardial silhouette|silhouette",
    "LUNG": "lung|lung field|pulmonary|airspace|lung parenchyma|lung apex",
    "LUNG_VOLUME": "lung volume|inspiratory volume|inspiratory effort|inspiration|inspiratory|volume|lung expansion",
    "AORTA": "aorta|aortic|thoracic aorta|aortic arch|aortic knob",
    "DIAPHRAGM": "diaphragm|hemidiaphragm",
    "ANGLE": "costophrenic|costophrenic angle|costophrenic sulcus|cp angle|sulcus|costodiaphragmatic",
    "SPINE": "spine|thoracic spine|vertebra body|vertebra|t spine|thoracolumbar|lumbar|thoracic vertebra|spinal|"
    "vertebra column|disc|disk",
    "BONE": "bone|bony|osseous|rib|skeletal|skeleton|clavicle|humerus|sternum|bony thorax|osseous structure|"
    "bony structure",
    "MEDIASTINUM": "mediastinum|mediastinal|mediastinal contour|mediastinal silhouette|superior mediastinum|"
    "paratracheal",
    "HILUM": "hilum|hilum contour|hilum structure|perihilum",
    "PULMONARY_ARTERY": "pulmonary artery|pulmonary arterial|pulmonary trunk",
    "VESSELS": "pulmonary vascularity|pulmonary vasculature|vascularity|vasculature|pulmonary vessel|vascular marking",
    "INTERSTITIUM": "interstitium|interstitial|bronchovascular|peribronchial|reticular|reticulonodular",
    "PLEURAL_SPACE": "pleural space|pleural cavity",
    "CURVATURE": "curvature|curve",
    "LYMPH": "lymph|lymph node|node",
    "SHOULDER": "shoulder|glenohumeral|acromioclavicular|ac joint",
    "LEAD": "lead|electrode",
    "WIRE": "wire",
    "ENLARGED": "enlarged|enlargement|large|prominent|prominence|widened|widening|dilated|dilatation|increased|full|"
    "fullness|borderline|generous|convexity|dilation|bulky|globular",
    "BORDERLINE": "top normal|upper normal|upper limit|upper limit of normal|near top normal",
    "LOW": "low|decreased|diminished|reduced|shallow|small|poor|lower|suboptimal",
    "HIGH": "high|expanded",
    "RAISED": "elevated|elevation|raised|higher|eventrated",
    "FLAT": "flattened|flattening|flat|depressed",
    "TIP": "tip",
    "SVC": "svc|superior vena cava|cavoatrial|caval|cava",
    "WITHIN": "within normal limit|within limit of normal|within limit",
    "BLUNT": "blunted|blunting|obscured",
    "COARSE": "coarse|coarsened|coarsening|crowded|thickening|change|prominent|prominence|increased|accentuated|"
    "accentuation|chronic",
    "SHIFTED": "shifted|shift|deviated|deviation|displaced",
    "NORMAL": "normal|unremarkable|clear|intact|normal limit|midline|normally inflated|well inflated|well expanded|"
    "well aerated|not enlarged|sharp",
}

# Finding ← (anatomy, state, the most words between them); either order, in one clause. A part may itself be a finding.
PAIRS: tuple[tuple[str, str, str, int], ...] = (
    ("cardiomegaly", "HEART", "ENLARGED", 5),
    ("cardiomegaly", "HEART", "BORDERLINE", 6),
    ("enlarged cardiac silhouette", "SILHOUETTE", "ENLARGED", 5),
    ("enlarged mediastinum", "MEDIASTINUM", "ENLARGED", 3),
    ("hilar enlargement", "HILUM", "ENLARGED", 3),
    ("pulmonary artery enlargement", "PULMONARY_ARTERY", "ENLARGED", 3),
    ("vascular congestion", "VESSELS", "ENLARGED", 3),
    ("tortuous aorta", "AORTA", "ENLARGED", 3),
    ("hypoinflation", "LUNG_VOLUME", "LOW", 4),
    ("hyperinflation", "LUNG_VOLUME", "HIGH", 3),
    ("hyperinflation", "LUNG_VOLUME", "ENLARGED", 3),
    ("elevated diaphragm", "DIAPHRAGM", "RAISED", 5),
    ("flattened diaphragm", "DIAPHRAGM", "FLAT", 5),
    ("costophrenic angle blunting", "ANGLE", "BLUNT", 5),
    ("interstitial markings", "INTERSTITIUM", "COARSE", 2),
    ("mediastinal shift", "MEDIASTINUM", "SHIFTED", 3),
    ("scoliosis", "SPINE", "CURVATURE", 5),
    ("calcified granuloma", "calcification", "granuloma", 6),
    ("lymphadenopathy", "LYMPH", "ENLARGED", 2),
    ("implanted device", "LEAD", "HEART", 5),
    ("catheter", "TIP", "SVC", 8),
    ("surgical material", "WIRE", "postoperative change", 3),
)

# A finding whose words another one, named beside it, has taken up.
ABSORBS: dict[str, tuple[str, ...]] = {
    "calcified granuloma": ("calcification", "granuloma"),
    "atherosclerosis": ("calcification",),
}

# "The heart is normal": findings that a normal part denies.
DENIES: dict[str, tuple[str, ...]] = {
    "HEART": ("cardiomegaly",),
    "SILHOUETTE": ("cardiomegaly", "enlarged cardiac silhouette", "enlarged mediastinum"),
    "LUNG": ("opacity", "airspace disease", "consolidation", "infiltrate", "atelectasis", "edema", "nodule"),
    "MEDIASTINUM": ("enlarged mediastinum",),
    "HILUM": ("hilar enlargement",),
    "VESSELS": ("vascular congestion",),
    "AORTA": ("tortuous aorta", "aortic aneurysm"),
    "BONE": ("fracture", "bone deformity"),
    "SPINE": ("degenerative spine", "scoliosis"),
    "PLEURAL_SPACE": ("pleural effusion", "pneumothorax"),
    "ANGLE": ("costophrenic angle blunting",),
    "DIAPHRAGM": ("elevated diaphragm", "flattened diaphragm"),
}

SIDES: dict[str, str] = {
    "left": "left|left sided|leftward|lingula|lingular",
    "right": "right|right sided|rightward|middle lobe",
    "bilateral": "bilateral|bilaterally|both|bibase|biapex|right and left|left and right|bilateral lung",
}

ZONES: dict[str, str] = {
    "upper": "upper lobe|upper lung|upper zone|upper",
    "middle": "middle lobe|mid lung|midlung|mid zone|lingula|lingular|middle|mid",
    "lower": "lower lobe|lower lung|lower zone|lower",
    "apex": "apex|biapex",
    "base": "base|bibase|lung base|infrahilar",
    "hilar": "hilum|perihilum|suprahilar",
    "retrocardiac": "retrocardiac|behind the heart",
    "diffuse": "diffuse|diffusely|scattered",
}

# Finding ← tags of the Indiana reports: a MeSH or RadLex heading, or a heading with one of its qualifiers.
TAGS: dict[str, str] = {
    "opacity": "Opacity",
    "density": "Density",
    "airspace disease": "Airspace Disease",
    "consolidation": "Consolidation",
    "infiltrate": "Infiltrate",
    "pneumonia": "Pneumonia",
    "atelectasis": "Pulmonary Atelectasis",
    "volume loss": "Volume Loss",
    "edema": "Pulmonary Edema",
    "vascular congestion": "Pulmonary Congestion",
    "heart failure": "Heart Failure",
    "interstitial markings": "Markings|Lung/interstitial|Opacity/interstitial",
    "interstitial lung disease": "Lung Diseases, Interstitial",
    "hypoinflation": "Lung/hypoinflation",
    "hyperinflation": "Lung/hyperdistention",
    "emphysema": "Emphysema|Pulmonary Emphysema|Bullous Emphysema|Blister",
    "copd": "Pulmonary Disease, Chronic Obstructive",
    "lucency": "Lucency|Lung, Hyperlucent",
    "nodule": "Nodule",
    "mass": "Mass",
    "granuloma": "Granuloma",
    "calcified granuloma": "Calcified Granuloma",
    "granulomatous disease": "Granulomatous Disease",
    "calcification": "Calcinosis",
    "scar": "Cicatrix",
    "fibrosis": "Pulmonary Fibrosis|Fibrosis",
    "bronchiectasis": "Bronchiectasis",
    "bronchial thickening": "Thickening/bronchi|Bronchitis|Bronchiolitis",
    "cavity": "Cavitation",
    "cyst": "Cysts",
    "tuberculosis": "Tuberculosis",
    "pleural effusion": "Pleural Effusion|Hydropneumothorax",
    "pneumothorax": "Pneumothorax|Hydropneumothorax",
    "pleural thickening": "Thickening",
    "costophrenic angle blunting": "Costophrenic Angle/blunted|Sulcus/blunted|Costophrenic Angle/obscured",
    "cardiomegaly": "Cardiomegaly",
    "enlarged cardiac silhouette": "Cardiac Shadow/enlarged|Cardiac Shadow/prominent",
    "pericardial effusion": "Pericardial Effusion",
    "enlarged mediastinum": "Mediastinum/enlarged|Mediastinum/prominent",
    "hilar enlargement": "Lung/hilum",
    "mediastinal shift": "Shift",
    "lymphadenopathy": "Lymph Nodes|Lymph nodes|Mediastinum/lymph nodes",
    "tortuous aorta": "Aorta/tortuous|Aorta, Thoracic/tortuous|Aorta/enlarged|Aorta, Thoracic/enlarged|Aorta/prominent",
    "aortic aneurysm": "Aortic Aneurysm",
    "atherosclerosis": "Atherosclerosis",
    "pulmonary artery enlargement": "Pulmonary Artery|Hypertension, Pulmonary",
    "epicardial fat": "Epicardial Fat|Adipose Tissue",
    "hiatal hernia": "Hernia, Hiatal|Hernia, Diaphragmatic",
    "elevated diaphragm": "Diaphragm/elevated",
    "flattened diaphragm": "Diaphragm/flattened",
    "eventration": "Diaphragmatic Eventration",
    "pneumoperitoneum": "Pneumoperitoneum",
    "degenerative spine": "Thoracic Vertebrae/degenerative|Spine/degenerative|Lumbar Vertebrae/degenerative",
    "spondylosis": "Spondylosis",
    "osteophyte": "Osteophyte",
    "scoliosis": "Scoliosis",
    "kyphosis": "Kyphosis",
    "fracture": "Fractures, Bone",
    "bone deformity": "Deformity",
    "osteopenia": "Bone Diseases, Metabolic|Osteoporosis",
    "arthritis": "Arthritis",
    "sclerosis": "Sclerosis",
    "hyperostosis": "Hyperostosis, Diffuse Idiopathic Skeletal",
    "dislocation": "Dislocations",
    "chest wall deformity": "Funnel Chest|Pectus Carinatum",
    "subcutaneous emphysema": "Subcutaneous Emphysema|Mediastinal Emphysema",
    "catheter": "Catheters, Indwelling",
    "tube": "Tube, Inserted",
    "implanted device": "Implanted Medical Device",
    "surgical material": "Surgical Instruments|Sutures",
    "stent": "Stents",
    "spinal fusion": "Spinal Fusion",
    "medical device": "Medical Device",
    "foreign body": "Foreign Bodies",
    "postoperative change": "Pneumonectomy|Mastectomy",
    "breast implant": "Breast Implants",
    "nipple shadow": "Nipple Shadow",
    "contrast": "Contrast Media",
    "limited image": "Technical Quality of Image Unsatisfactory",
}
